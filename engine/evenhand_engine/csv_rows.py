"""Rows: CSV files, read whole or refused with the place of the error."""

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TypeVar

import msgspec

from evenhand_engine.errors import StartupError

R = TypeVar("R", bound=msgspec.Struct)


def read_rows(path: Path, kind: type[R], *, complete_lines_only: bool = False) -> list[R]:
    """The file's rows as `kind`, whose fields are the columns; other columns are ignored.

    `complete_lines_only`: leave out a last line without its end, which a writer that was killed left behind.

    Raises:
        StartupError: no such file, a column is missing, or a value is not what its field demands; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path}: cannot be read: {error}") from error
    if complete_lines_only:
        text = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(StringIO(text, newline=""), restkey="", restval="", strict=True)
    try:
        _check_columns(path, kind, reader.fieldnames or ())
        return [_row(path, reader.line_num, kind, row) for row in reader]
    except csv.Error as error:
        raise StartupError(f"{path}, line {reader.reader.line_num}: {error}") from error


def _check_columns(path: Path, kind: type[R], columns: Sequence[str]) -> None:
    required = [field.name for field in msgspec.structs.fields(kind) if field.required]
    missing = [name for name in required if name not in columns]
    if missing:
        raise StartupError(f"{path}: column {missing[0]} is missing; needed are {', '.join(required)}")


def _row(path: Path, line: int, kind: type[R], row: dict[str, str]) -> R:
    try:
        return msgspec.convert(row, kind, strict=False)
    except msgspec.ValidationError as error:
        raise StartupError(f"{path}, line {line}: {error}") from error
