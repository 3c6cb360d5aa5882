"""Virtual time: an event loop in which waiting takes none, for tests of what happens when."""

import asyncio
import selectors


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
