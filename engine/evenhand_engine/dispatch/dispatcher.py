"""Dispatcher: who is sent next. Queues, order and charges are the scheduler's own; room is the window's.

Where the engine's scheduler computes a request step by step, a dispatcher sends it and is told what comes back: its prompt is
charged when it is sent, its outputs as they stream, and what turns out different is given back or added at its end. Of an
answer that comes as a whole the expected outputs are charged when it is sent: else its tenant would look unserved until
then. Tenants,
users, classes, weights, concurrency limits, queue timeouts and suspension are `RequestTable`, `Ledger` and `Order`, as in the engine.
What a sidecar cannot do it does not pretend: a sent request is never preempted or paused, and KV guarantees and ceilings
are not enforced.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec import structs

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.dispatch.flight import Flight, Room
from evenhand_engine.dispatch.gauges import Gauges
from evenhand_engine.dispatch.window import Window
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.order import Order
from evenhand_engine.scheduler.queue_timeouts import QueueTimeouts
from evenhand_engine.scheduler.request import FinishReason, Request, SamplingParams
from evenhand_engine.scheduler.request_table import RequestTable
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_policy.config import KvCacheShare, SchedulerConfig

_OUTPUT_SMOOTHING = 0.05  # weight of the newest request in the mean length of outputs
_FIRST_EXPECTED_TOKENS = 256.0
_UNSEEN_TOKENS_PER_SECOND = 20  # of an answer that nobody waited for; engines are rarely slower


class Errand(Request):
    """A request to an upstream: sizes instead of tokens.

    Attributes:
        num_prompt_tokens: an estimate until the upstream tells.
        max_output_tokens: the most that it may have, over all its choices.
        num_choices: seats that it takes upstream.
        is_silent: its answer comes as a whole.
        flight: what the window counts of it; None while it is queued.
        num_charged_outputs: output tokens that its tenant was charged.
    """

    __slots__ = ("flight", "is_silent", "max_output_tokens", "num_charged_outputs", "num_choices")

    def __init__(
        self,
        request_id: str,
        tenant_id: str,
        arrival_time: float,
        *,
        num_prompt_tokens: int,
        max_output_tokens: int,
        user: str = "",
        priority: int = 0,
        num_choices: int = 1,
        is_silent: bool = False,
    ) -> None:
        super().__init__(
            request_id,
            tenant_id,
            (),
            SamplingParams(max_tokens=max_output_tokens),
            arrival_time,
            user=user,
            priority=priority,
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_output_tokens = max_output_tokens
        self.num_choices = num_choices
        self.is_silent = is_silent
        self.flight: Flight | None = None
        self.num_charged_outputs = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSettings:
    """What does not come with a policy.

    Attributes:
        max_in_flight: most requests at the upstream at once, whatever the window: connections and memory of ours.
        slack_tokens: by how many tokens, at the dearer price, a class may go before another.
        max_model_len: the upstream's context; for the reported bound alone.
    """

    max_in_flight: int = 4096
    slack_tokens: int = 2048
    max_model_len: int = 8192

    def scheduler_settings(self) -> SchedulerSettings:
        """The same in the scheduler's words. A request in flight takes one seat and one block: memory is the window's."""
        return SchedulerSettings(
            max_num_seqs=self.max_in_flight,
            num_kv_blocks=self.max_in_flight,
            max_num_batched_tokens=self.slack_tokens,
            max_model_len=self.max_model_len,
            enable_prefix_caching=False,
            growth_blocks=0.0,
        )


class Dispatcher:
    """Queues requests and hands out those that may be sent.

    Attributes:
        ledger: what every tenant was served.
        request_table: who is queued and who is in flight ("running").
        config: what is enforced.
        step_id: requests sent so far.
    """

    def __init__(
        self,
        window: Window,
        config: SchedulerConfig,
        settings: DispatchSettings | None = None,
        *,
        num_replicas: int = 1,
    ) -> None:
        self.window = window
        scheduler_settings = (settings or DispatchSettings()).scheduler_settings()
        self.ledger = Ledger(scheduler_settings)
        self.request_table = request_table = RequestTable(scheduler_settings, self.ledger.shares)
        self._order = Order(
            self.ledger, request_table.capacity, request_table.active, request_table.running_tenants, is_fair=True
        )
        self.step_id = 0
        self._timeouts = QueueTimeouts(self.request_table)
        self._mean_output = _FIRST_EXPECTED_TOKENS
        self.reconfigure(config, num_replicas=num_replicas)

    @property
    def num_preemptions(self) -> int:
        """What has been sent is never taken back."""
        return 0

    # -- commands

    def add(self, errand: Errand, now: float) -> None:
        """Queue a request, whose id must be new; `dispatch` says what becomes of it."""
        self._close()  # what was used while nobody waited is settled before somebody does
        self.request_table.add(errand)
        if self.request_table.tenants[errand.tenant_id].is_suspended:
            self.request_table.finish(errand, FinishReason.TENANT_SUSPENDED)
        else:
            self._timeouts.watch(errand)

    def reconfigure(self, config: SchedulerConfig, *, num_replicas: int = 1) -> None:
        """Enforce another config from now on; requests in flight go on, queued ones of a suspended tenant end."""
        self.config = config
        config = _without_memory(config)
        self.ledger.prices = config.prices
        self.request_table.configure(config, num_replicas)
        for request in list(self.request_table.requests.values()):
            if request.started_at is None and self.request_table.tenants[request.tenant_id].is_suspended:
                self.request_table.finish(request, FinishReason.TENANT_SUSPENDED)
        self._timeouts.reset()

    def dispatch(self, now: float) -> Iterator[Errand]:
        """Requests to be sent now, in this order, each charged for its prompt. Each must be told of until `end`."""
        self.window.advance(now)
        for request in self._timeouts.take_overdue(now):
            self.request_table.finish(request, FinishReason.QUEUE_TIMEOUT)
        while (errand := self._next(now)) is not None:
            yield self._send(errand, now)
        if not self.request_table.active:
            self.window.release()
        self._close()

    def refused(self) -> list[tuple[str, FinishReason]]:
        """Ids of requests that left the queue unsent since the last call, and why."""
        outputs, self.request_table.outputs = self.request_table.outputs, []
        return [(output.request_id, output.finish_reason) for output in outputs if output.finish_reason is not None]

    @property
    def next_event(self) -> float:
        """When `dispatch` should be called although nothing happened: the window's time, or a queue timeout."""
        return min(self.window.next_due if self.request_table.active else float("inf"), self._timeouts.next_due)

    # -- what the upstream does

    def started(self, errand: Errand, now: float) -> None:
        """The first chunk of its answer came."""
        if errand.flight is not None:
            self.window.start(errand.flight, now)

    def heard(self, now: float) -> bool:
        """An event of any answer came. Returns whether `dispatch` should be called for that alone."""
        return self.window.hear(now)

    def generated(self, errand: Errand, num_tokens: int) -> None:
        """So many more tokens of its output came."""
        flight = errand.flight
        if flight is not None and num_tokens > 0:
            self.window.grow(flight, num_tokens)
            if flight.num_output_tokens > errand.num_charged_outputs:
                self._charge_outputs(errand, flight.num_output_tokens)

    def sized(self, errand: Errand, num_prompt_tokens: int, num_cached_tokens: int = 0) -> None:
        """The upstream says how long the prompt was, and how much of it a prefix hit spared: that is not charged."""
        if errand.flight is not None:
            self.window.resize_prompt(errand.flight, num_prompt_tokens)
            tenant = self.request_table.tenants[errand.tenant_id]
            self.ledger.correct_prompt(tenant, errand, max(0, num_prompt_tokens - num_cached_tokens))

    def counted(self, errand: Errand, num_output_tokens: int) -> None:
        """The upstream says how many output tokens there were in all: more or fewer than were seen to come."""
        if errand.flight is not None:
            self.window.grow(errand.flight, num_output_tokens - errand.flight.num_output_tokens)
            self._charge_outputs(errand, num_output_tokens)

    def end(self, errand: Errand, reason: FinishReason = FinishReason.STOP) -> None:
        """It has ended or its client is gone, queued or in flight. One that has ended: nothing."""
        if errand.request_id not in self.request_table.requests:
            return
        if errand.flight is not None:
            num_output_tokens = errand.flight.num_output_tokens
            self.window.end(errand.flight)
            self._charge_outputs(errand, num_output_tokens)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._mean_output += _OUTPUT_SMOOTHING * (num_output_tokens / errand.num_choices - self._mean_output)
            errand.flight = None
        self.request_table.finish(errand, reason)
        self.request_table.outputs.pop()  # whoever ends it knows

    def left(self, errand: Errand, now: float) -> None:
        """Its client is gone, queued or in flight, and `end` follows. Of an answer that would have come as a whole nothing tells how
        far it was, and to have it computed must not be free: it is charged by time."""
        if errand.flight is not None and errand.is_silent:
            num_tokens = int(max(0.0, now - errand.flight.due) * _UNSEEN_TOKENS_PER_SECOND) * errand.num_choices
            self.counted(errand, min(num_tokens, errand.max_output_tokens))

    def correct(self, gauges: Gauges, now: float) -> None:
        """A report of the upstream's gauges."""
        self.window.correct(gauges, now)

    # -- order

    def _next(self, now: float) -> Errand | None:
        """The head of the queue whose turn it is, if the window has room for it. None is bypassed for want of room: the
        room that comes free is for it. But what a tenant with many in flight must leave, one with few may use, unless
        it is ahead by more than the slack."""
        capacity, ledger = self.request_table.capacity, self.ledger
        bypassed: set[str] = set()
        limit = float("inf")
        while capacity.num_missing_seats <= 0:
            tenant = self._order.next_tenant(bypassed, may_start_new=True)
            request = tenant.next_prompt() if tenant is not None else None
            if tenant is None or not isinstance(request, Errand) or ledger.service(tenant) > limit:
                return None
            room = self.window.room(request.num_prompt_tokens, self._expected(request), now)
            if room is Room.FREE or (room is Room.RESERVED and capacity.has_few_seats(tenant)):
                return request
            if room is Room.NONE:
                return None
            bypassed.add(tenant.tenant_id)
            limit = min(limit, ledger.service(tenant) + ledger.slack)
        return None

    def _send(self, errand: Errand, now: float) -> Errand:
        tenant: Tenant = self.request_table.tenants[errand.tenant_id]
        self.request_table.start(errand, now)
        self.request_table.end_prefill(errand)  # what has been sent waits for nobody here
        self.request_table.outputs.pop()  # that it has started: the upstream tells when it really does
        self.ledger.charge_prompt(tenant, errand, 0, errand.num_prompt_tokens)
        num_expected = self._expected(errand)
        errand.flight = self.window.send(
            errand.num_prompt_tokens, num_expected, now, num_seats=errand.num_choices, is_silent=errand.is_silent
        )
        if errand.is_silent:
            self._charge_outputs(errand, num_expected)
        self.step_id += 1
        return errand

    def _charge_outputs(self, errand: Errand, num_output_tokens: int) -> None:
        """Charge what came since the last time, or give back what did not."""
        if num_output_tokens == errand.num_charged_outputs:
            return
        tenant, start = self.request_table.tenants[errand.tenant_id], errand.num_prompt_tokens
        self.ledger.correct_outputs(tenant, errand, start + errand.num_charged_outputs, start + num_output_tokens)
        errand.num_charged_outputs = num_output_tokens

    def _expected(self, errand: Errand) -> int:
        return min(errand.max_output_tokens, int(self._mean_output * errand.num_choices))

    def _close(self) -> None:
        """Advance the virtual time: what waits here is left out."""
        waits = self._order.least_served()
        self.ledger.close_step({waits.tenant_id} if waits else set())


def _without_memory(config: SchedulerConfig) -> SchedulerConfig:
    """The same without KV guarantees and ceilings: the cache is the upstream's."""
    tenants = (structs.replace(tenant, kv_cache=KvCacheShare()) for tenant in config.tenants)
    return structs.replace(config, tenants=tuple(tenants))
