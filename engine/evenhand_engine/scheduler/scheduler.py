"""Scheduler: decides, every iteration, whose tokens run.

Pure: no clock, no I/O, no randomness; time comes in as an argument, so that simulator and tests drive the very code
that serves. A step, in order:

    1. expire     queued requests past their tenant's queue timeout leave
    2. relieve    a tenant that the last step starved of memory or a seat may preempt (preemption.py); what
                  runs for a tenant too far ahead pauses
    3. decode     every running request that generates computes one token; those of tenants that are ahead take turns
                  where somebody's inter-token objective, or the budget, has no room for all (turns.py)
    4. prefill    chunks of prompts, one tenant at a time by least virtual service, while the budget lasts
    5. draft      streams guess tokens beyond their next one with what is left of the step (speculation.py)
    6. close      the virtual time advances to the least virtual service of those left out (ledger.py)

A step may be planned before the previous batch's results are known: an output in flight counts as a token whose value
only the runner knows, and what a request computed past its end is discarded and not charged.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.admission import Admission
from evenhand_engine.scheduler.batch import Batch, BatchPlan
from evenhand_engine.scheduler.capacity import Fit
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.order import Order
from evenhand_engine.scheduler.pace import Pace, StepBudget
from evenhand_engine.scheduler.preemption import Preemption
from evenhand_engine.scheduler.queue_timeouts import QueueTimeouts
from evenhand_engine.scheduler.request import FinishReason, Request, RequestOutput, Sampled
from evenhand_engine.scheduler.request_table import RequestTable
from evenhand_engine.scheduler.results import Results
from evenhand_engine.scheduler.speculation import Speculation
from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_engine.scheduler.turns import take_turns
from evenhand_policy.config import SchedulerConfig

_NEVER = float("inf")


class _Step(NamedTuple):
    """A batch that was planned and whose results are still to come."""

    batch: Batch
    requests: list[Request]  # whose the batch's items are
    planned_at: float
    shape: StepShape
    expected: list[bytes]  # hashes of prompt blocks that the batch fills


class Scheduler:
    """Fair-share iteration scheduler with continuous batching, chunked prefill and paged KV.

    Attributes:
        request_table: the requests' places and the KV blocks.
        ledger: what every tenant was served.
        speculation: what drafts came to.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        config: SchedulerConfig,
        *,
        num_replicas: int = 1,
        token_budgets: Iterator[int] | None = None,
    ) -> None:
        """`token_budgets`: those of the steps to come, without end, instead of max_num_batched_tokens (for replays)."""
        self.settings = settings
        self.ledger = Ledger(settings)
        self.request_table = table = RequestTable(settings, self.ledger.shares)
        self.step_id = 0
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR
        self._is_static = settings.scheduling_policy is SchedulingPolicy.STATIC
        self._order = Order(self.ledger, table.capacity, table.active, table.running_tenants, is_fair=self._is_fair)
        self._preemption = Preemption(settings, table, self.ledger, self._order)
        self._pace = Pace(settings, table, token_budgets)
        self._timeouts = QueueTimeouts(table)
        self.speculation = Speculation(settings, table)
        self._results = Results(table, self.ledger, self.speculation)
        self._is_starved = False  # whether the last step left out a prompt for want of memory or a seat
        self._in_flight: deque[_Step] = deque()
        self._last_update = -_NEVER
        self.reconfigure(config, num_replicas=num_replicas)

    @property
    def num_preemptions(self) -> int:
        """Since the start."""
        return self.request_table.num_preemptions

    # -- commands

    def add(self, request: Request, now: float) -> None:
        """Queue a request, whose id must be new. It is rejected at once if it can never fit or may not queue."""
        self.request_table.add(request)
        if self.request_table.tenants[request.tenant_id].is_suspended:
            self.request_table.finish(request, FinishReason.TENANT_SUSPENDED)
        elif self.request_table.capacity.fit(request) is Fit.NEVER:
            self.request_table.finish(request, FinishReason.OVERLOADED)
        else:
            self._timeouts.watch(request)

    def abort(self, request_id: str, reason: FinishReason, num_output_tokens: int | None = None) -> None:
        """End a request; an unknown or finished one is ignored.

        `num_output_tokens`: how many of its outputs count. The rest, past a stop string, is given back to its tenant, but
        no more than was computed before this side could hear of it: who reads late has used the machine.
        """
        request = self.request_table.requests.get(request_id)
        if request is None:
            return
        if num_output_tokens is not None:
            surplus = min(max(0, request.num_output_tokens - num_output_tokens), self.settings.max_refunded_tokens)
            self._results.correct(request, len(request.token_ids), len(request.token_ids) - surplus)
        self.request_table.finish(request, reason)

    def reconfigure(self, config: SchedulerConfig, *, num_replicas: int = 1) -> None:
        """Enforce another config from the next step on. Running requests go on; what a deleted tenant has left is
        served under the share of unknown tenants; queued requests of a suspended tenant end."""
        self.config = config
        self.ledger.prices = config.prices
        self.request_table.configure(config, num_replicas)
        for request in list(self.request_table.requests.values()):
            is_queued = request.started_at is None and request.num_preemptions == 0
            if is_queued and self.request_table.tenants[request.tenant_id].is_suspended:
                self.request_table.finish(request, FinishReason.TENANT_SUSPENDED)
        self._timeouts.reset()

    # -- the loop

    def step(self, now: float) -> Batch | None:
        """Plan the next batch; None if there is nothing to compute now."""
        for request in self._timeouts.take_overdue(now):
            self.request_table.finish(request, FinishReason.QUEUE_TIMEOUT)
        if self._is_static:
            self._form_static_batch(now)
        self.ledger.open_step(self._order.least_served_of_all() if self._is_fair and self.ledger.is_congested else None)
        if self._is_fair and self._is_starved:
            self._preemption.make_room(now)
        self._preemption.pause(now)
        budget = self._pace.budget(now)
        plan = BatchPlan()
        left_out = self._schedule_decodes(budget, plan)
        expected = self._schedule_prompts(budget, plan, now)
        if not left_out:
            self.speculation.extend(plan, budget, may_grow=not self._is_starved)
        self._preemption.resume()
        if tenant := self._order.least_served():
            left_out.add(tenant.tenant_id)
        self.ledger.close_step(left_out)
        if not plan.requests:
            return None
        self.step_id += 1
        batch = plan.build(self.step_id, self.request_table.capacity.take_freed_seats())
        self._in_flight.append(_Step(batch, plan.requests, now, budget.shape, expected))
        return batch

    def update(self, sampled: Sequence[Sampled], now: float) -> list[RequestOutput]:
        """Take in the results of the oldest batch without any: one for each of its items with samples, in order."""
        step = self._end_step()
        self._pace.step_time.observe(step.shape, now - max(step.planned_at, self._last_update))
        self._last_update = now
        self._results.take(step.batch, step.requests, sampled)
        return self.collect()

    def fail(self, now: float) -> list[RequestOutput]:
        """The oldest batch without results has none, since it could not be computed: its requests end with an error."""
        step = self._end_step()
        self._last_update = now
        self._results.fail(step.batch, step.requests)
        return self.collect()

    def _end_step(self) -> "_Step":
        step = self._in_flight.popleft()
        self.request_table.blocks.forget(step.expected)
        return step

    def collect(self) -> list[RequestOutput]:
        """News of requests since the last call: first starts, tokens, ends."""
        outputs, self.request_table.outputs = self.request_table.outputs, []
        return outputs

    # -- the static baseline

    def _form_static_batch(self, now: float) -> None:
        """The baseline: whoever fits starts together, and the next batch waits for the last of them."""
        if self.request_table.num_running:
            return
        for request in sorted(self.request_table.requests.values(), key=lambda request: request.position):
            fit = self.request_table.capacity.fit(request)
            if fit is Fit.NEVER:
                self.request_table.finish_oversized(request)
            elif fit is Fit.FITS and self.request_table.tenants[request.tenant_id].may_start:
                self.request_table.start(request, now)
            else:
                break

    # -- 3. decode

    def _schedule_decodes(self, budget: StepBudget, plan: BatchPlan) -> set[str]:
        """One token for every stream, or for those whose turn it is where there is no room for all; returns the tenants
        of which streams were left out."""
        ledger, capacity = self.ledger, self.request_table.capacity
        turns = take_turns(self.request_table.running_tenants.values(), budget, ledger.service, ledger.next_output_cost)
        have_room = self._preemption.grow(chain.from_iterable(requests for _, requests in turns.taken))
        context = 0
        for tenant, requests in turns.taken:
            computed = requests if have_room else capacity.with_room(requests)
            if computed:
                context += plan.add_decodes(computed)
                ledger.charge_outputs(tenant, computed)
            if tenant.tenant_id in turns.left_out:
                tenant.end_turns(computed)
        budget.spend_decodes(len(plan.requests), context)
        return turns.left_out

    # -- 4. prefill

    def _schedule_prompts(self, budget: StepBudget, plan: BatchPlan, now: float) -> list[bytes]:
        """Chunks of prompts while the budget lasts; returns the hashes of blocks that they fill.

        A prompt whose next block is in flight waits for it instead of computing it too, for a step or two.
        """
        admission = Admission(self.settings, self.request_table, self.ledger, self._order, now)
        expected: list[bytes] = []
        while budget.fit(0, 1) > 0 and (chosen := admission.next_prompt()) is not None:
            tenant, request = chosen
            if request.started_at is None and not admission.start(tenant, request):
                continue
            num_tokens = budget.fit(request.num_computed_tokens, request.num_pending_tokens)
            if num_tokens == 0:
                break
            expected += self._schedule_chunk(tenant, request, num_tokens, budget, plan)
        self._is_starved = admission.has_left_out
        return expected

    def _schedule_chunk(
        self, tenant: Tenant, request: Request, num_tokens: int, budget: StepBudget, plan: BatchPlan
    ) -> list[bytes]:
        """Put the next tokens of a prompt into the batch; the last chunk gives the first output token."""
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        is_last = end == request.num_tokens
        plan.add_chunk(request, num_tokens)
        budget.spend(start, num_tokens)
        self.ledger.charge_prompt(tenant, request, start, end)
        if is_last:
            self.ledger.charge_outputs(tenant, (request,))
            self.request_table.end_prefill(request)
        return self.request_table.blocks.expect(request, start, end)
