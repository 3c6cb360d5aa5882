"""Virtual time: an event loop in which waiting takes none, for tests of what happens when."""

import asyncio
import contextlib
import selectors
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from evenhand_operator.clock import Clock

T = TypeVar("T")
_BEGINNING = 1_800_000_000.0  # Unix time


class JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting, lets the time pass."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class VirtualClock(asyncio.SelectorEventLoop):
    """A loop whose time passes only while everybody sleeps, and then at once."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class VirtualTime(contextlib.AbstractContextManager["VirtualTime"]):
    """Runs one coroutine after another in virtual time.

    Attributes:
        clock: what it is then; the same for all that wait.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=VirtualClock)

    def __enter__(self) -> Self:
        loop = self._runner.get_loop()
        self.clock = Clock(loop.time, lambda: _BEGINNING + loop.time())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns."""
        return self._runner.run(work)
