"""Steps: when the upstream's steps end, by the events that come of each."""

_BURST_SECONDS = 0.005  # events of one step come within this time


class Steps:
    """Hears every event. Knows nothing of steps of which none comes."""

    def __init__(self) -> None:
        self._began_at = self._ended_at = self._heard_at = -float("inf")

    def hear(self, now: float) -> bool:
        """An event came; returns whether it is the first of its step, so that the next begins."""
        is_first = now - self._heard_at > _BURST_SECONDS
        self._heard_at = now
        if is_first:
            self._began_at, self._ended_at = self._ended_at, now
        return is_first

    def seconds(self, since: float) -> float:
        """How long the last one took, as far as was heard; 0: it began before that time."""
        return self._ended_at - self._began_at if self._began_at >= since - _BURST_SECONDS else 0.0
