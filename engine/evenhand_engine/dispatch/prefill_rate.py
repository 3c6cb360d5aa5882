"""PrefillRate: prompt tokens that an upstream prefills in a second, by what was seen of first chunks."""

_SMOOTHING = 0.1
_FIRST_SECONDS = 0.1  # weight of the initial rate: any prompt that takes longer says more


class PrefillRate:
    """Tokens over seconds, the oldest weighing least. So a short prompt, whose time is mostly that of a step, says little.

    Args:
        tokens_per_second: to begin with.
    """

    def __init__(self, tokens_per_second: float) -> None:
        self._num_tokens = tokens_per_second * _FIRST_SECONDS
        self._seconds = _FIRST_SECONDS

    @property
    def tokens_per_second(self) -> float:
        return self._num_tokens / self._seconds

    def observe(self, num_tokens: float, seconds: float) -> None:
        """So many tokens took so long, one prompt after another."""
        self._num_tokens += num_tokens - _SMOOTHING * self._num_tokens
        self._seconds += max(seconds, 1e-3) - _SMOOTHING * self._seconds

    def scale(self, factor: float) -> None:
        """Something else tells that it is higher or lower."""
        self._num_tokens *= factor
