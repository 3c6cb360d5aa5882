"""Ticket: what one proxied request holds of quota, queue and metrics until it ends, in the process that owns all three.

Whoever passes a request on asks `Tickets` for one by a `Booking`, waits for its turn, sends the request, and tells the ticket what
comes back. It need not know whether the owner is its own process (`OwnTickets`) or another (`remote_tickets`).
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from evenhand_engine.dispatch.dispatcher import Errand
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost
from evenhand_engine.frontend.metrics import RequestMetrics
from evenhand_engine.openai.errors import refuse_draining, refuse_finished
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import TenantConfig

if TYPE_CHECKING:
    from evenhand_engine.sidecar.service import SidecarService


class Booking(msgspec.Struct, frozen=True, kw_only=True):
    """What one body asks for.

    Attributes:
        num_prompt_tokens: of all its prompts, as far as they are known before the upstream says it.
        num_choices: answers that it asks for, over all its prompts.
        max_output_tokens: most outputs of a choice; None: what policy, context and quota leave.
        user, priority: order it within its tenant.
        is_silent: its answer comes as a whole.
        num_taken: requests of the quota that `Admission.check` has taken for it.
    """

    tenant_id: str
    num_prompt_tokens: int
    num_prompts: int = 1
    num_choices: int = 1
    max_output_tokens: int | None = None
    user: str = ""
    priority: int = 0
    is_silent: bool = False
    num_taken: int = 0


class Ticket(Protocol):
    """Follows one request: `turn`, then what comes back of it, then `close`, once and whatever happens.

    Attributes:
        limit: most outputs of one choice.
        num_output_tokens: of all choices, that were told or are charged, as far as this process knows.
    """

    limit: int

    @property
    def num_output_tokens(self) -> int: ...

    async def turn(self) -> None:
        """Wait until the request is to be sent. Raises Refusal if it never will be."""
        ...

    def generated(self, num_tokens: int) -> Refusal | None:
        """So many more outputs came. Returns why the request must end, if the quota leaves no more."""
        ...

    def sized(self, num_prompt_tokens: int, num_cached_tokens: int = 0) -> None:
        """The upstream says how long the prompts were; 0: it computed none of them."""
        ...

    def counted(self, num_output_tokens: int, *, is_estimate: bool = False) -> None:
        """How many outputs there were in all, as the upstream says, or by an estimate of ours."""
        ...

    def complete(self) -> None:
        """The upstream has answered all of it."""
        ...

    def close(self, outcome: str, reason: str) -> None:
        """It has ended, as `RequestMetrics.end` has it; what it holds is given back."""
        ...


class Tickets(Protocol):
    """Who gives them out."""

    def tenant(self, tenant_id: str) -> TenantConfig:
        """Its policy in force."""
        ...

    async def book(self, booking: Booking) -> Ticket:
        """Take quota for a request. Raises Refusal if there is none."""
        ...


class OwnTicket:
    """A ticket in the process that owns quota, queue and metrics.

    Attributes:
        errand: what the dispatcher knows of it.
    """

    def __init__(self, service: "SidecarService", booking: Booking) -> None:
        """Raises Refusal where the tenant may not have it."""
        admission, tenant_id, num_choices = service.admission, booking.tenant_id, booking.num_choices
        now = time.monotonic()
        most = admission.max_concurrent_requests(tenant_id)
        if most is not None and num_choices > most:
            message = f"The engine runs all {num_choices} answers of a body at once; the policy of tenant {tenant_id} allows {most}."
            raise Refusal(400, "invalid_value", message)
        room, asked = service.info.max_model_len, booking.max_output_tokens
        length = math.ceil(booking.num_prompt_tokens / booking.num_prompts)
        self.limit = min(asked or admission.max_output_tokens(tenant_id, length), room - length)
        expected = None if asked else admission.expected_output_tokens(tenant_id)
        costs = [Cost(length, self.limit, expected)] * num_choices
        self._reservations = admission.reserve(tenant_id, costs, now, booking.num_taken)  # one for each answer
        self._service = service
        self._dispatcher = service.upstream.dispatcher
        self._booking = booking
        self._num_prompt_tokens = booking.num_prompt_tokens
        self.errand = Errand(
            service.new_errand_id(),
            tenant_id,
            now,
            num_prompt_tokens=booking.num_prompt_tokens,
            max_output_tokens=self.limit * num_choices,
            user=booking.user,
            priority=booking.priority,
            num_choices=num_choices,
            is_silent=booking.is_silent,
        )
        self._metrics = RequestMetrics(
            service.metrics, tenant_id, booking.num_prompt_tokens, self.errand.max_output_tokens, now
        )

    @property
    def num_output_tokens(self) -> int:
        return self.errand.num_charged_outputs

    def queue(self, called: Callable[[Refusal | None], None]) -> None:
        """Have `called` once, perhaps at once: with None when the request is to be sent, else with why it never will be."""

        def leave(reason: FinishReason | None) -> None:
            if reason is None:
                self._start()
                return called(None)
            delay = self._service.admission.queue_delay(self._booking.tenant_id, time.monotonic())
            called(refuse_finished(reason, delay) or refuse_draining())

        self._service.upstream.queue(self.errand, leave)

    async def turn(self) -> None:
        future: asyncio.Future[Refusal | None] = asyncio.get_running_loop().create_future()
        self.queue(lambda refusal: None if future.done() else future.set_result(refusal))
        if (refusal := await future) is not None:
            raise refusal

    def _start(self) -> None:
        for reservation in self._reservations:
            self._service.admission.start(reservation)
        self._metrics.start(0, time.monotonic())

    def generated(self, num_tokens: int) -> Refusal | None:
        now, errand, dispatcher = time.monotonic(), self.errand, self._dispatcher
        is_first, may_send = errand.num_charged_outputs == 0, dispatcher.heard(now)
        if is_first:
            dispatcher.started(errand, now)
        dispatcher.generated(errand, num_tokens)
        self._metrics.take_tokens(num_tokens, now)
        if is_first or may_send:
            self._service.upstream.pump()
        reservations = self._reservations
        if len(reservations) > 1:
            reservations.append(reservations.pop(0))  # whose it is, nobody says: each in turn
        reservation = reservations[0]
        if reservation.account.generated(reservation, num_tokens, now):
            return None
        tenant_id = self._booking.tenant_id
        message = f"Tenant {tenant_id} has used its tokens per minute."
        delay = self._service.admission.queue_delay(tenant_id, now)
        return Refusal(429, "tokens_per_minute", message, retry_after=delay)

    def sized(self, num_prompt_tokens: int, num_cached_tokens: int = 0) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._dispatcher.sized(self.errand, num_prompt_tokens, num_cached_tokens)

    def counted(self, num_output_tokens: int, *, is_estimate: bool = False) -> None:
        if self._booking.is_silent and not is_estimate:
            self._metrics.take_tokens(num_output_tokens, time.monotonic())
        self._dispatcher.counted(self.errand, num_output_tokens)

    def complete(self) -> None:
        self._dispatcher.end(self.errand)

    def close(self, outcome: str, reason: str) -> None:
        now, service, errand = time.monotonic(), self._service, self.errand
        if outcome == "aborted":
            self._dispatcher.left(errand, now)
        service.upstream.end(errand)
        num_prompt_tokens = math.ceil(self._num_prompt_tokens / self._booking.num_prompts)
        share, rest = divmod(errand.num_charged_outputs, len(self._reservations))
        for number, reservation in enumerate(self._reservations):
            reservation.resize_prompt(num_prompt_tokens)
            service.admission.settle(reservation, share + (number < rest), now)
        self._metrics.end(outcome, reason, 0, now)


class OwnTickets:
    """Those of the process that owns what they hold."""

    def __init__(self, service: "SidecarService") -> None:
        self._service = service

    def tenant(self, tenant_id: str) -> TenantConfig:
        return self._service.admission.account(tenant_id).config

    async def book(self, booking: Booking) -> Ticket:
        return OwnTicket(self._service, booking)
