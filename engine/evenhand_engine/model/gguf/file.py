"""GgufFile: keys and tensors of a GGUF file or of all parts of a split one. Whatever is wrong is one StartupError."""

import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from gguf import GGUFReader, Keys, ReaderTensor

from evenhand_engine.errors import StartupError
from evenhand_engine.model.gguf.parts import gguf_parts

T = TypeVar("T")


class GgufFile:
    """Attributes:
    path: the first part.
    architecture: llama.cpp's name of it.
    tensors: of all parts, by name.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or all parts of a split one whichever of them `path` is. Raises StartupError."""
        parts = gguf_parts(path)
        self.path = parts[0]
        readers = [_open(part) for part in parts]
        self._reader = readers[0]
        self.tensors: dict[str, ReaderTensor] = {}
        for part, reader in zip(parts, readers, strict=True):
            self._add_tensors(part, reader)
        self._check_parts(parts, readers)
        self.architecture = self.require(Keys.General.ARCHITECTURE, str)

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, None if it is absent; `{arch}` in the key stands for the architecture."""
        return _value(self.path, self._reader, self.name_of(key), kind)

    def require(self, key: str, kind: type[T]) -> T:
        value = self.get(key, kind)
        if value is None:
            raise self.error(f"lacks {self.name_of(key)}, which every model needs: convert the model again")
        return value

    def count(self, key: str) -> int | None:
        """The value of a key that is an integer of at least 1, None if it is absent."""
        value = self.get(key, int)
        if value is not None and value < 1:
            raise self.error(f"has {self.name_of(key)} = {value}, which must be at least 1")
        return value

    def require_count(self, key: str) -> int:
        value = self.count(key)
        return self.require(key, int) if value is None else value

    def error(self, problem: str) -> StartupError:
        """What to raise where the file itself is wrong; `problem` begins with a verb."""
        return StartupError(f"model {self.path}: the GGUF file {problem}")

    def name_of(self, key: str) -> str:
        """The key as the file spells it."""
        return key.replace("{arch}", self.architecture) if "{arch}" in key else key

    def _add_tensors(self, part: Path, reader: GGUFReader) -> None:
        for tensor in reader.tensors:
            if tensor.name in self.tensors:
                raise StartupError(f"model {part}: tensor {tensor.name} is in another part of the model already")
            self.tensors[tensor.name] = tensor

    def _check_parts(self, parts: list[Path], readers: list[GGUFReader]) -> None:
        for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
            count = _value(part, reader, Keys.Split.LLM_KV_SPLIT_COUNT, int) or 1
            if (count, _value(part, reader, Keys.Split.LLM_KV_SPLIT_NO, int) or 0) != (len(parts), number):
                raise StartupError(
                    f"model {part}: its keys say that it is one of {count} parts, its name that it is part {number + 1} "
                    f"of {len(parts)}: parts must keep the names that they were made with (...-00001-of-{count:05}.gguf)"
                )
        num_tensors = self.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, int)
        if len(parts) > 1 and num_tensors not in (None, len(self.tensors)):
            raise self.error(f"should have {num_tensors} tensors in all its parts, but they hold {len(self.tensors)}")


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        problem = re.sub(r"\s+", " ", str(error))
        raise StartupError(f"model {path}: not a readable GGUF file, maybe truncated: {problem}") from error


def _value(path: Path, reader: GGUFReader, key: str, kind: type[T]) -> T | None:
    field = reader.get_field(key)
    if field is None:
        return None
    contents: Any = None
    try:
        contents = field.contents()
        return msgspec.convert(contents, kind)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise StartupError(f"model {path}: the GGUF file's {key} is malformed: {error}") from error
