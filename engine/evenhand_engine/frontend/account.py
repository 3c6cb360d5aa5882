"""TenantAccount: one tenant at the door: its buckets, what it has in flight, how fast it drains. Pure: time is an argument."""

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from evenhand_engine.frontend.quota import TokenBucket
from evenhand_policy.config import Enforcement, TenantConfig

_DRAIN_SMOOTHING = 0.2  # weight of the newest interval in the mean time between two requests that end
_NUM_OUTPUTS = 128  # last ones that the percentile is of
_FIRST_OUTPUT_TOKENS = 256  # expected of a tenant of which nothing is known
_PERCENTILE = 0.95


@dataclass(frozen=True, slots=True)
class Cost:
    """What one prompt may use at most, and what is taken of the quota before it has: tokens in, tokens out.

    Attributes:
        expected_output_tokens: of a request that names no limit of its own; None: the limit is what is reserved.
    """

    num_prompt_tokens: int
    max_output_tokens: int
    expected_output_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.max_output_tokens

    @property
    def num_reserved_tokens(self) -> int:
        expected = self.max_output_tokens if self.expected_output_tokens is None else self.expected_output_tokens
        return self.num_prompt_tokens + min(self.max_output_tokens, expected)


@dataclass(slots=True, eq=False)
class Reservation:
    """The claim of one prompt on its tenant's quota, from `Admission.reserve` to `Admission.settle`."""

    account: "TenantAccount"
    cost: Cost
    counted: bool  # False: over a limit that is only audited, so it holds no quota
    num_reserved_tokens: int  # prompt and outputs
    num_output_tokens: int = 0
    started: bool = False

    def resize_prompt(self, num_prompt_tokens: int) -> None:
        """The prompt turned out to have so many tokens, which are settled instead of the estimate."""
        self.cost = replace(self.cost, num_prompt_tokens=num_prompt_tokens)


@dataclass(slots=True, eq=False)
class TenantAccount:
    """Live state of one tenant at the door.

    Attributes:
        requests, tokens: buckets of the policy's quotas; None: no quota.
        num_in_flight: requests that hold quota and have not ended.
        num_not_started: of these, those that wait.
        refusals, audited: by reason, how many were refused, and how many an audited limit would have refused.
    """

    config: TenantConfig
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    num_in_flight: int = 0
    num_not_started: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    audited: Counter[str] = field(default_factory=Counter)
    _last_end: float = 0.0  # or since when it has had something in flight
    _num_outputs_since: int = 0  # tokens of all its requests since then
    _num_reserved_outputs: int = 0  # of all that is in flight, as first reserved
    _seconds_per_request: float | None = None  # mean time between two requests that end while others wait
    _outputs: deque[int] = field(default_factory=lambda: deque(maxlen=_NUM_OUTPUTS))  # lengths, of requests that ended

    @property
    def audits(self) -> bool:
        return self.config.enforcement is Enforcement.AUDIT

    @property
    def expected_output_tokens(self) -> int:
        """The 95th percentile of its last outputs."""
        if not self._outputs:
            return _FIRST_OUTPUT_TOKENS
        return max(1, sorted(self._outputs)[int(_PERCENTILE * (len(self._outputs) - 1))])

    def take_requests(self, num_requests: int, now: float) -> None:
        if self.requests is not None and num_requests > 0:
            self.requests.take(num_requests, now)

    def reserve(self, cost: Cost, counted: bool, now: float) -> Reservation:
        if counted:
            if self.tokens is not None:
                self.tokens.take(cost.num_reserved_tokens, now)
            if self.num_in_flight == 0:
                self._last_end, self._num_outputs_since = now, 0
            self.num_in_flight += 1
            self.num_not_started += 1
            self._num_reserved_outputs += cost.num_reserved_tokens - cost.num_prompt_tokens
        return Reservation(self, cost, counted, cost.num_reserved_tokens)

    def start(self, reservation: Reservation) -> None:
        if not reservation.started:
            reservation.started = True
            self.num_not_started -= reservation.counted

    def generated(self, reservation: Reservation, num_tokens: int, now: float) -> bool:
        """Note outputs; take more quota for a request that outgrows what was expected of it.

        So much again as was expected is taken at a time, and only while something is left: a tenant overshoots by one such
        part at most. Returns False where nothing is left.
        """
        self._num_outputs_since += num_tokens
        reservation.num_output_tokens += num_tokens
        if self.tokens is None:
            return True
        expected = reservation.cost.expected_output_tokens
        if expected is None or not reservation.counted:
            return True
        most = reservation.cost.num_tokens
        used = reservation.cost.num_prompt_tokens + reservation.num_output_tokens
        if used < reservation.num_reserved_tokens or reservation.num_reserved_tokens >= most:
            return True
        if self.tokens.level(now) <= 0:
            return False
        part = min(expected, most - reservation.num_reserved_tokens)
        self.tokens.take(part, now)
        reservation.num_reserved_tokens += part
        return True

    def settle(self, reservation: Reservation, num_output_tokens: int, now: float) -> None:
        if reservation.started and num_output_tokens:
            self._outputs.append(num_output_tokens)
        if not reservation.counted:
            return
        self.num_in_flight -= 1
        self._num_reserved_outputs -= reservation.cost.num_reserved_tokens - reservation.cost.num_prompt_tokens
        used = reservation.cost.num_prompt_tokens + num_output_tokens
        if not reservation.started:
            used = 0
            self.num_not_started -= 1
            if self.requests is not None:
                self.requests.give_back(1, now)
        if self.tokens is not None:
            self.tokens.give_back(reservation.num_reserved_tokens - used, now)
        interval, mean = now - self._last_end, self._seconds_per_request
        self._last_end, self._num_outputs_since = now, 0
        self._seconds_per_request = interval if mean is None else mean + _DRAIN_SMOOTHING * (interval - mean)

    def seconds_per_request(self, now: float) -> float:
        """Time between two of its requests that end: as it was, and never less than since the last has ended.

        Before one has, at the pace of their outputs, if each needs as many tokens as were reserved for it; 0 if it has none
        in flight.
        """
        if self.num_in_flight == 0:
            return self._seconds_per_request or 0.0
        waited, mean = now - self._last_end, self._seconds_per_request
        if mean is None and self._num_outputs_since:
            mean = waited * self._num_reserved_outputs / self.num_in_flight / self._num_outputs_since
        return max(mean or 0.0, waited)
