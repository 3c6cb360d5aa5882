"""Progress of a long preparation: a bar on a terminal, one plain line for each stage elsewhere. Written to stderr."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[float], None]


class Progress:
    """Stages one after the other, each with a known total in any unit."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, description: str, total: float) -> Advance:
        """Announce a stage. The result is called with the amount done since the last call."""
        if not self._console.is_terminal:
            self._console.print(description, highlight=False, soft_wrap=True)
        task = self._bars.add_task(description, total=total)
        return lambda amount: self._bars.advance(task, amount)
