"""Progress of a long preparation: a bar on a terminal; elsewhere log records, one for each stage and one now and then inside it."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[float], None]

logger = logging.getLogger(__name__)
"""Each record's message says what is being done, and how far it has come; who wants to know has a handler here."""

_SECONDS_BETWEEN = 5.0


class Stage:
    """One part of a preparation: logged as it begins, and then every few seconds with its percentage.

    `total`: in any unit; 0 while it is not known.
    """

    def __init__(self, description: str, total: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._description = description
        self._total = total
        self._done = 0.0
        self._clock = clock
        self._said_at = clock()
        logger.info("%s", description)

    def advance(self, amount: float) -> None:
        """So much more is done."""
        self.reach(self._done + amount, self._total)

    def reach(self, done: float, total: float) -> None:
        """So much is done in all."""
        self._done, self._total = done, total
        now = self._clock()
        if total and now - self._said_at >= _SECONDS_BETWEEN:
            self._said_at = now
            logger.info("%s: %d %%", self._description, min(100 * done / total, 100))


class Progress:
    """Stages one after the other, each with a known total in any unit."""

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console  # here, since a start that prepares nothing needs none of it
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

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
            return Stage(description, total).advance
        task = self._bars.add_task(description, total=total)
        return lambda amount: self._bars.advance(task, amount)


class _Handler(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


@contextlib.contextmanager
def listening(tell: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile, hand what is said to `tell` too, in the thread that says it."""
    handler, level = _Handler(tell), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
