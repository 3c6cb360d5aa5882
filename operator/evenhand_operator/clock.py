"""Clock: what time it is. Whoever waits does so by the event loop's own time."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """The machine's, or a test's.

    Attributes:
        monotonic: seconds that never go back.
        wall: Unix time in seconds.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


SYSTEM_CLOCK = Clock()
