"""Tombstones: what is gone, so that an older page of a list, or a late event, does not bring it back."""

from collections.abc import Callable
from typing import Generic, TypeVar

_REMEMBERED_SECONDS = 900.0  # no list or event is that late: a continue token lives for five minutes
K = TypeVar("K")


class Tombstones(Generic[K]):
    """At which resource version objects went, for as long as a list that is still being read may have them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._graves: dict[K, tuple[int, float]] = {}  # version and time, in the order of time

    def bury(self, key: K, version: int) -> None:
        """The object was gone, or on its way, at that version."""
        now = self._clock()
        while self._graves and (oldest := next(iter(self._graves.items())))[1][1] < now - _REMEMBERED_SECONDS:
            del self._graves[oldest[0]]
        before, _ = self._graves.pop(key, (version, now))
        self._graves[key] = (max(before, version), now)

    def version(self, key: K) -> int:
        """The latest version at which the object was gone; -1 where it is not known to have gone."""
        return self._graves.get(key, (-1, 0.0))[0]
