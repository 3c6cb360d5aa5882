"""TokenBucket: a rate per minute with a burst. Pure: time is an argument, and never runs backwards."""

from dataclasses import dataclass

_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class TokenBucket:
    """Holds at most `capacity`, refills by `rate` each second.

    Attributes:
        limit: what the policy says, in units per minute over the whole pool.
        capacity: the most that can be taken at once.
        rate: units per second.
    """

    limit: int
    capacity: float
    rate: float
    _level: float
    _updated_at: float

    @classmethod
    def resized(
        cls, bucket: "TokenBucket | None", limit: int | None, num_replicas: int, largest: int, now: float
    ) -> "TokenBucket | None":
        """The bucket of one engine of a pool: it refills `limit / num_replicas` a minute.

        It may burst to its share or to one `largest` permitted request, whichever is more, and never beyond `limit`.
        A bucket that existed stays as full as it was, in proportion; a new one is full. None: no limit.
        """
        if limit is None:
            return None
        share = limit / num_replicas
        capacity = max(share, float(min(limit, largest)))
        fullness = 1.0 if bucket is None else bucket.level(now) / bucket.capacity
        return cls(limit, capacity, share / _SECONDS, capacity * fullness, now)

    def level(self, now: float) -> float:
        """What can be taken at `now`; below zero after taking more than there was."""
        return min(self.capacity, self._level + (now - self._updated_at) * self.rate)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; infinite if it is more than the bucket holds."""
        if amount > self.capacity:
            return float("inf")
        return max(0.0, amount - self.level(now)) / self.rate

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount
        self._updated_at = now

    def give_back(self, amount: float, now: float) -> None:
        """Put back what was taken and not used."""
        self.take(-amount, now)  # `level` never shows more than the capacity

    def seconds_until_full(self, now: float) -> float:
        return (self.capacity - self.level(now)) / self.rate
