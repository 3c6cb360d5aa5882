"""Flight: one request on its way to an upstream; Room: whether one more may be sent."""

from dataclasses import dataclass
from enum import Enum, auto

_NEVER = float("inf")


class Room(Enum):
    """Whether a request may be sent."""

    FREE = auto()
    RESERVED = auto()  # only what is left for tenants that have few in flight
    NONE = auto()


@dataclass(slots=True, eq=False)
class Flight:
    """One request on its way: what the window counts of it.

    Attributes:
        num_expected_tokens: outputs that it is expected to have at its end.
        num_seats: answers that it asked for; each runs by itself upstream.
        is_silent: its answer comes as a whole, so that its start cannot be seen.
        is_long: it had its turn as a long one.
        backlog: prompt tokens that were left to prefill when it was sent, its own included.
        due: when a silent one is taken to have started.
    """

    num_prompt_tokens: int
    num_expected_tokens: int
    is_silent: bool
    sent_at: float
    num_seats: int = 1
    is_long: bool = False
    backlog: float = 0.0
    due: float = _NEVER
    num_output_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + max(self.num_expected_tokens, self.num_output_tokens)
