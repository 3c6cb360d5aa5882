"""Overtaken: pods that say that they enforce a version which this leader did not make, and when to go on above it.

That happens after a restored etcd, once. A pod that says so again and again lies: every new epoch is told to all pods, and
until they have answered nothing is known to be in force. So a pool is given a new epoch ever more rarely. Pure.
"""

from collections.abc import Callable

from evenhand_operator.objects import ObjectKey
from evenhand_policy.version import Version

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 600.0


class Overtaken:
    """Of all pools, in one term. `clock`: monotonic time in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[ObjectKey, Version] = {}
        self._again: dict[ObjectKey, tuple[float, float]] = {}  # not before that time, and then how long not

    def see(self, pool: ObjectKey, version: Version) -> None:
        """A pod of the pool says that it enforces this."""
        self._seen[pool] = max(version, self._seen.get(pool, version))

    def due(self) -> dict[ObjectKey, Version]:
        """The highest that was seen of each pool that may have a new epoch now."""
        now = self._clock()
        return {pool: seen for pool, seen in self._seen.items() if self._again.get(pool, (now, 0.0))[0] <= now}

    def dismiss(self, pool: ObjectKey) -> None:
        """Nothing is to be done about it."""
        self._seen.pop(pool, None)

    def raised(self, pool: ObjectKey) -> None:
        """The pool has got a new epoch."""
        self.dismiss(pool)
        _, pause = self._again.get(pool, (0.0, _FIRST_PAUSE_SECONDS))
        self._again[pool] = self._clock() + pause, min(2 * pause, _LONGEST_PAUSE_SECONDS)
