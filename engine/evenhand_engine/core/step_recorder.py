"""Recorded runs: what each step computed and how long it took, for the simulator's fits and for replays."""

import csv
import itertools
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from evenhand_engine.csv_rows import read_rows
from evenhand_engine.errors import StartupError
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.step_time import FEWEST_STEPS, StepShape, shape_of

TokenCount = Annotated[int, Meta(ge=0)]


class _StepRow(msgspec.Struct, frozen=True, kw_only=True):
    prefill_tokens: TokenCount
    decode_tokens: TokenCount
    prefill_context: TokenCount
    decode_context: TokenCount
    prefill_pairs: TokenCount = 0
    seconds: Annotated[float, Meta(ge=0, le=1e9)]  # refuses NaN and infinity too


class StepRecorder:
    """Writes a row as each step ends, so that whatever kills the engine costs the row being written at most."""

    def __init__(self, path: Path) -> None:
        """Start the file anew.

        Raises:
            StartupError: it cannot be written.
        """
        try:
            self._file = path.open("w", buffering=1, newline="", encoding="utf-8")  # line by line
        except OSError as error:
            raise StartupError(f"{path}: steps cannot be recorded: {error.strerror}") from error
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(_StepRow.__struct_fields__)

    def record(self, batch: Batch, seconds: float) -> None:
        """Note one finished step."""
        self._writer.writerow((*astuple(shape_of(batch)), f"{seconds:.6f}"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def load_steps(path: Path) -> tuple[list[StepShape], list[float]]:
    """Read a recorded run, also one whose last row was never finished.

    Raises:
        StartupError: no such file, a column is missing, a value is no number, or there are too few steps to fit.
    """
    rows = read_rows(path, _StepRow, complete_lines_only=True)
    if len(rows) < FEWEST_STEPS:
        raise StartupError(f"{path}: {len(rows)} steps are too few for a fit; record at least {FEWEST_STEPS}")
    shapes = [
        StepShape(r.prefill_tokens, r.decode_tokens, r.prefill_context, r.decode_context, r.prefill_pairs) for r in rows
    ]
    return shapes, [row.seconds for row in rows]


def load_token_budgets(path: Path) -> Iterator[int]:
    """Tokens that each step of a recorded run computed, over and over.

    Raises:
        StartupError: the file cannot be read as a recorded run, or has a step without tokens.
    """
    shapes, _ = load_steps(path)
    budgets = [shape.num_prefill_tokens + shape.num_decode_tokens for shape in shapes]
    if 0 in budgets:
        raise StartupError(f"{path}: step {budgets.index(0) + 1} has no tokens, so it cannot be replayed")
    return itertools.cycle(budgets)
