"""Claims: what each choice of a request may use of its tenant's quota, and what becomes of it.

A claim joins the reservation and the metrics of one choice, in the process that owns both, and sees that they end exactly once.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost, Reservation
from evenhand_engine.frontend.admission import Admission
from evenhand_engine.frontend.metrics import Metrics, RequestMetrics


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What one body asks of its tenant's quota.

    Attributes:
        prompt_lengths: tokens of each prompt.
        num_choices: of each prompt.
        max_tokens: most outputs of a choice; None: what policy, context and quota leave.
        min_tokens: outputs before which a choice may not end.
        num_taken: requests of the quota that `Admission.check` has taken for it.
    """

    prompt_lengths: tuple[int, ...]
    num_choices: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    num_taken: int = 0

    @property
    def num_claims(self) -> int:
        """One for each choice; the choices of a prompt follow each other."""
        return len(self.prompt_lengths) * self.num_choices


class Claim(Protocol):
    """Follows one choice. The calls are one `started` at most, then `generated` any number of times, then one `ended`.

    `now` is `time.monotonic()`, which is one clock for all processes of a machine.

    Attributes:
        max_tokens: its output limit.
        exhausted: called when the quota leaves no more for it, so that it must end; set by whoever generates.
    """

    max_tokens: int
    exhausted: Callable[[], None]

    def started(self, num_cached_tokens: int, now: float) -> None: ...

    def generated(self, num_tokens: int, now: float) -> None: ...

    def ended(self, outcome: str, reason: str, num_output_tokens: int, num_preemptions: int, now: float) -> None:
        """`outcome` and `reason`: as in `RequestMetrics.end`."""
        ...


class OwnClaim:
    """A claim in the process that owns quotas and metrics."""

    __slots__ = (
        "_admission",
        "_is_settled",
        "_metrics",
        "_reservation",
        "exhausted",
        "max_tokens",
    )

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        tenant_id: str,
        reservation: Reservation,
        now: float,
        num_choices: int | None = 1,
    ) -> None:
        """`num_choices`: of its prompt, told of the first one alone; None: another choice."""
        cost = reservation.cost
        self.max_tokens = cost.max_output_tokens
        self.exhausted: Callable[[], None] = _ignore
        self._admission = admission
        self._reservation = reservation
        self._metrics = RequestMetrics(
            metrics, tenant_id, cost.num_prompt_tokens, cost.max_output_tokens, now, num_choices
        )
        self._is_settled = False

    @property
    def num_output_tokens(self) -> int:
        """That were told of so far."""
        return self._reservation.num_output_tokens

    def started(self, num_cached_tokens: int, now: float) -> None:
        self._admission.start(self._reservation)
        self._metrics.start(num_cached_tokens, now)

    def generated(self, num_tokens: int, now: float) -> None:
        self._metrics.take_tokens(num_tokens, now)
        if not self._reservation.account.generated(self._reservation, num_tokens, now):
            self.exhausted()

    def ended(self, outcome: str, reason: str, num_output_tokens: int, num_preemptions: int, now: float) -> None:
        """Give back the unused quota and note the end, once."""
        if not self._is_settled:
            self._is_settled = True
            self._admission.settle(self._reservation, num_output_tokens, now)
            self._metrics.end(outcome, reason, num_preemptions, now)


def _ignore() -> None: ...


def reserve(admission: Admission, metrics: Metrics, tenant_id: str, demand: Demand, now: float) -> list[OwnClaim]:
    """Take quota for all choices of all prompts, or for none and raise Refusal."""
    lengths, asked = demand.prompt_lengths, demand.max_tokens
    limits = [asked or admission.max_output_tokens(tenant_id, length) for length in lengths]
    if min(limits) < demand.min_tokens:
        raise Refusal(400, "invalid_value", f"`min_tokens` is above {min(limits)}, the most.", param="min_tokens")
    expected = None if asked else admission.expected_output_tokens(tenant_id)
    costs = [
        Cost(length, limit, expected)
        for length, limit in zip(lengths, limits, strict=True)
        for _ in range(demand.num_choices)
    ]
    reservations = admission.reserve(tenant_id, costs, now, demand.num_taken)
    return [
        OwnClaim(
            admission, metrics, tenant_id, reservation, now, None if number % demand.num_choices else demand.num_choices
        )
        for number, reservation in enumerate(reservations)
    ]
