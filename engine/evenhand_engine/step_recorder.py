"""StepRecorder: writes what each step computed and how long it took, for the simulator's fits and for replays."""

from pathlib import Path
from types import TracebackType
from typing import Self

from evenhand_engine.batch import Batch
from evenhand_engine.simulator.device import StepShape, load_steps, save_steps, shape_of


class StepRecorder:
    """Context manager: keeps the steps in memory, and writes the file at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shapes: list[StepShape] = []
        self._seconds: list[float] = []

    def record(self, batch: Batch, seconds: float) -> None:
        """Note one finished step."""
        self._shapes.append(shape_of(batch))
        self._seconds.append(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        save_steps(self._path, self._shapes, self._seconds)


def load_token_budgets(path: Path) -> list[int]:
    """Tokens that each step of a recorded run computed.

    Raises:
        StartupError: the file cannot be read as a recorded run.
    """
    shapes, _ = load_steps(path)
    return [shape.num_prefill_tokens + shape.num_decode_tokens for shape in shapes]
