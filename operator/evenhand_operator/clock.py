"""Clock: what time it is, and by how much pauses are spread. Whoever waits does so by the event loop's own time."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """The machine's, or a test's.

    Attributes:
        monotonic: seconds that never go back.
        wall: Unix time in seconds.
        chance: from 0 to 1, each as likely as any other.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    chance: Callable[[], float] = random.random

    def spread(self, seconds: float) -> float:
        """That long, a fifth more or less: so that those who began together do not go on together."""
        return seconds * (0.8 + 0.4 * self.chance())


SYSTEM_CLOCK = Clock()
