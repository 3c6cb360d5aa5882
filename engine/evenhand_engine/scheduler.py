"""Scheduler: decides, every iteration, whose tokens run.

Pure: no clock, no I/O, no randomness; time comes in as an argument, so that simulator and tests drive the very code
that serves. A step, in order:

    1. expire     queued requests past their tenant's queue timeout leave
    2. relieve    a tenant that the last step starved of memory or a seat may preempt (preemption.py)
    3. decode     every running request that generates computes one token
    4. prefill    chunks of prompts, one tenant at a time by least virtual service, while the budget lasts
    5. close      the virtual time advances to the least virtual service of those left out (fair_share.py)

A step may be planned before the previous batch's results are known: an output in flight counts as a token whose value
only the runner knows, and what a request computed past its end is discarded and not charged.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from evenhand_engine.batch import Batch, ScheduledRequest
from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.fair_share import VIRTUAL_UNIT, FairShare
from evenhand_engine.messages import RequestOutput
from evenhand_engine.preemption import Preemption
from evenhand_engine.request import FinishReason, Request
from evenhand_engine.roster import Fit, Roster
from evenhand_engine.step_time import StepBudget, StepLoad, StepTimeModel
from evenhand_engine.tenant import Tenant
from evenhand_policy.config import SchedulerConfig

_NEVER = float("inf")
_MAX_MISFITS = 4  # prompts without room that one step looks at before it stops admitting


class Scheduler:
    """Fair-share iteration scheduler with continuous batching, chunked prefill and paged KV.

    Attributes:
        roster: the requests' places and the KV blocks.
        shares: the tenants' virtual service.
        step_time: the step-time model, fitted to the batches seen.
        num_preemptions: since the start.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        config: SchedulerConfig,
        *,
        num_replicas: int = 1,
        token_budgets: Iterator[int] | None = None,
    ) -> None:
        """`token_budgets`: the token budget of each step to come, instead of max_num_batched_tokens (for replays)."""
        self.settings = settings
        self.roster = Roster(settings)
        self.shares = FairShare()
        self.step_time = StepTimeModel()
        self.num_preemptions = 0
        self.step_id = 0
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR
        self._is_static = settings.scheduling_policy is SchedulingPolicy.STATIC
        self._preemption = Preemption(settings, self.roster.blocks, self.shares.virtual_service)
        self._token_budgets = token_budgets
        self._held_until: dict[str, float] = {}  # tenants whose inter-token objective bounds steps
        self._is_starved = False  # whether the last step left out a prompt for want of memory or a seat
        self._outputs: list[RequestOutput] = []
        self._finished: list[str] = []
        self._in_flight: deque[tuple[int, float, StepLoad]] = deque()  # (step_id, time, load) of batches without update
        self._last_update = -_NEVER
        self.reconfigure(config, num_replicas=num_replicas)

    # -- commands

    def add(self, request: Request, now: float) -> None:
        """Queue a request, whose id must be new. It is rejected at once if it can never fit or may not queue."""
        self.roster.add(request)
        if self.roster.tenants[request.tenant_id].is_suspended:
            self._finish(request, FinishReason.TENANT_SUSPENDED)
        elif self.roster.fit(request) is Fit.NEVER:
            self._finish(request, FinishReason.OVERLOADED)

    def abort(self, request_id: str, reason: FinishReason, num_output_tokens: int | None = None) -> None:
        """End a request; an unknown or finished one is ignored.

        `num_output_tokens`: how many of its outputs count; the rest, past a stop string, is given back to its tenant.
        """
        request = self.roster.requests.get(request_id)
        if request is None:
            return
        if num_output_tokens is not None:
            surplus = max(0, request.num_output_tokens - num_output_tokens)
            self._charge_outputs(self.roster.tenants[request.tenant_id], (request,), -surplus)
        self._finish(request, reason)

    def reconfigure(self, config: SchedulerConfig, *, num_replicas: int = 1) -> None:
        """Enforce another config from the next step on. Running requests go on; what a deleted tenant has left is
        served under the share of unknown tenants; queued requests of a suspended tenant end."""
        self.config = config
        self.roster.configure(config, num_replicas)
        for request in list(self.roster.requests.values()):
            is_queued = request.started_at is None and request.num_preemptions == 0
            if is_queued and self.roster.tenants[request.tenant_id].is_suspended:
                self._finish(request, FinishReason.TENANT_SUSPENDED)

    # -- the loop

    def step(self, now: float) -> Batch | None:
        """Plan the next batch; None if there is nothing to compute now."""
        self._expire(now)
        if self._is_static:
            self._form_static_batch(now)
        elif self._is_fair and self._is_starved:
            self._relieve(now)
        budget = self._budget(now)
        scheduled: list[ScheduledRequest] = []
        left_out = self._schedule_decodes(budget, scheduled)
        capped = self._schedule_prompts(budget, scheduled, now)
        self._close(left_out, capped)
        if not scheduled:
            return None
        self.step_id += 1
        self._in_flight.append((self.step_id, now, budget.load))
        finished, self._finished = self._finished, []
        return Batch(self.step_id, tuple(scheduled), tuple(finished))

    def update(self, batch: Batch, token_ids: Sequence[int], now: float) -> list[RequestOutput]:
        """Take in the results of the oldest batch without one: a token id for each of its items with `samples`."""
        step_id, started_at, load = self._in_flight.popleft()
        assert step_id == batch.step_id, "batches must be updated in the order of their steps"
        self.step_time.observe(load, now - max(started_at, self._last_update))
        self._last_update = now
        sampled = iter(token_ids)
        block_size = self.settings.block_size
        for item in batch.scheduled:
            request, start = item.request, item.num_computed_tokens
            token_id = next(sampled) if item.samples else None
            if request.finish_reason is not None:
                if item.samples and request.finish_reason is FinishReason.STOP:
                    self._charge_outputs(self.roster.tenant(request.tenant_id), (request,), -1)
                continue
            end = start + item.num_scheduled_tokens
            if end % block_size == 0 or item.num_scheduled_tokens > 1:
                self.roster.blocks.commit(request, start, min(end, request.num_computed_tokens))
            if token_id is not None:
                self._take_token(request, token_id)
        return self.collect()

    def collect(self) -> list[RequestOutput]:
        """News of requests since the last call: first starts, tokens, ends."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # -- 1. expire, 2. relieve

    def _expire(self, now: float) -> None:
        overdue = [
            request
            for tenant in self.roster.active.values()
            if tenant.queue_timeout != _NEVER
            for request in tenant.waiting.overdue(now - tenant.queue_timeout)
        ]
        for request in overdue:
            self._finish(request, FinishReason.QUEUE_TIMEOUT)

    def _relieve(self, now: float) -> None:
        """Make room for a tenant within its KV guarantee, or for the one that is furthest behind; one prompt a step."""
        waiting = [tenant for tenant in self.roster.active.values() if tenant.waiting and tenant.may_start]
        running = self.roster.running_tenants.values()
        num_seats = self.roster.num_missing_seats
        for tenant in sorted((t for t in waiting if t.guaranteed_blocks), key=self._service):
            request = tenant.next_prompt()
            if request and request.started_at is None and self.roster.is_within_guarantee(request):
                fit = self.roster.fit(request)
                if fit is Fit.FITS:  # memory may be held for another's prompt, but not its guarantee
                    self._admit(request, now)
                    return
                num_blocks = self.roster.num_missing_blocks(request)
                if fit is Fit.STARVED and self._replace(
                    self._preemption.reclaim(tenant, running, num_blocks, num_seats), request, now
                ):
                    return
        if not waiting:
            return
        tenant = min(waiting, key=self._service)
        request = tenant.next_prompt()
        if request and request.started_at is None and self.roster.fit(request) is Fit.STARVED:
            cost = (self._prompt_cost(request) + self.settings.preemption_lag) * VIRTUAL_UNIT // tenant.weight
            num_blocks = self.roster.num_missing_blocks(request)
            self._replace(self._preemption.service(tenant, cost, running, num_blocks, num_seats, now), request, now)

    def _replace(self, victims: list[Request], request: Request, now: float) -> bool:
        for victim in victims:
            self._preempt(victim)
        if victims:
            self._admit(request, now)
        return bool(victims)

    def _prompt_cost(self, request: Request) -> int:
        """What the prompt of a waiting request will still be charged."""
        num_cached = len(self.roster.blocks.cached_prefix(request)) * self.settings.block_size
        num_tokens = request.num_prompt_tokens - max(request.num_charged_tokens, num_cached)
        return max(0, num_tokens) * self.config.prices.input_token

    def _form_static_batch(self, now: float) -> None:
        """The baseline: whoever fits starts together, and the next batch waits for the last of them."""
        if self.roster.num_running:
            return
        for request in sorted(self.roster.requests.values(), key=lambda request: request.position):
            fit = self.roster.fit(request)
            if fit is Fit.NEVER:
                self._finish_oversized(request)
            elif fit is Fit.FITS and self.roster.tenants[request.tenant_id].may_start:
                self._admit(request, now)
            else:
                break

    # -- 3. decode

    def _schedule_decodes(self, budget: StepBudget, scheduled: list[ScheduledRequest]) -> set[str]:
        """One token for every running request past its prompt; returns tenants that the budget left out."""
        self._grow_decodes()
        left_out = set()
        for tenant in sorted(self.roster.running_tenants.values(), key=self._service):
            decodes = [request for request in tenant.decoding.values() if not _is_at_end(request)]
            if len(decodes) > budget.tokens:
                del decodes[budget.tokens :]
                left_out.add(tenant.tenant_id)
            context = 0
            for request in decodes:
                start = request.num_computed_tokens
                scheduled.append(ScheduledRequest(request, start, 1, True))
                context += start
                request.num_computed_tokens = start + 1
                request.num_in_flight_tokens += 1
            budget.spend_decodes(len(decodes), context)
            self._charge_outputs(tenant, decodes)
        return left_out

    def _grow_decodes(self) -> None:
        block_size = self.settings.block_size
        growing = [
            request
            for tenant in self.roster.running_tenants.values()
            for request in tenant.decoding.values()
            if len(request.block_table) * block_size < request.num_computed_tokens + 1 and not _is_at_end(request)
        ]
        for request in growing:
            if request.block_table:  # else it was preempted for the growth of another
                self._grow(request)

    def _grow(self, request: Request) -> None:
        """Room for the request's next token: others yield for it, or it yields, or nobody can and it ends."""
        roster, tenant = self.roster, self.roster.tenants[request.tenant_id]
        while (at_ceiling := roster.is_at_ceiling(tenant)) or not roster.blocks.grow(request, request.num_tokens):
            num_rivals = tenant.num_running if at_ceiling else roster.num_running
            if num_rivals == 1:
                self._finish(request, FinishReason.LENGTH)
                return
            if self._is_fair or at_ceiling:
                victim = self._preemption.growth(request, tenant, roster.running_tenants.values())
            else:
                running = (r for t in roster.running_tenants.values() for r in t.running())
                victim = max(running, key=lambda request: request.position)
            self._preempt(victim)
            if victim is request:
                return

    # -- 4. prefill

    def _schedule_prompts(self, budget: StepBudget, scheduled: list[ScheduledRequest], now: float) -> set[str]:
        """Chunks of prompts while the budget lasts; returns tenants whose own KV ceiling holds them back.

        A prompt without room is bypassed by the next tenant's, but only so often: then memory is held for it.
        """
        misfits: dict[str, Tenant] = {}
        capped: set[str] = set()
        may_admit = not self._is_static and self.roster.num_missing_seats <= 0
        while budget.fit(0, 1) > 0:
            blocked = misfits.keys() | capped
            tenant = self._next_tenant(blocked, may_admit=may_admit)
            if tenant is None:
                break
            request = tenant.next_prompt(may_start=may_admit and tenant.tenant_id not in blocked)
            assert request is not None
            if request.started_at is None:
                fit = self.roster.fit(request)
                if fit is Fit.NEVER:
                    self._finish_oversized(request)
                elif fit is Fit.CAPPED:
                    capped.add(tenant.tenant_id)
                elif fit is Fit.STARVED:
                    misfits[tenant.tenant_id] = tenant
                    is_held_for = tenant.num_bypasses >= self.settings.max_bypasses
                    may_admit = self._is_fair and not is_held_for and len(misfits) < _MAX_MISFITS
                else:
                    self._admit(request, now)
                    for bypassed in misfits.values():
                        bypassed.num_bypasses += 1
                    may_admit = self.roster.num_missing_seats <= 0
                if fit is not Fit.FITS:
                    continue
            num_tokens = budget.fit(request.num_computed_tokens, request.num_pending_tokens)
            if num_tokens == 0:
                break
            self._schedule_chunk(tenant, request, num_tokens, budget, scheduled)
        self._is_starved = bool(misfits) or not may_admit
        return capped

    def _next_tenant(self, blocked: set[str], *, may_admit: bool) -> Tenant | None:
        """Whose prompt computes next; `blocked` tenants, or all without `may_admit`, can only go on with those begun.

        Fair: the least virtual service; among tenants within the slack of that the higher latency class, then the
        nearer deadline. So a class decides when inside the bound, never how much over time. Else: the oldest prompt.
        """
        if may_admit:
            tenants = [
                tenant
                for tenant_id, tenant in self.roster.active.items()
                if tenant.prefilling or (tenant.may_start and tenant_id not in blocked)
            ]
        else:
            tenants = list(self.roster.prefilling_tenants.values())
        if len(tenants) < 2:
            return tenants[0] if tenants else None
        if not self._is_fair:
            return min(tenants, key=_next_position)
        services = [self.shares.virtual_service(tenant.tenant_id) for tenant in tenants]
        limit = min(services) + self._slack
        near = [
            (tenant.class_rank, tenant.deadline, service, index)
            for index, (tenant, service) in enumerate(zip(tenants, services, strict=True))
            if service <= limit
        ]
        return tenants[min(near)[3]]

    @property
    def _slack(self) -> int:
        """How far ahead of the least served a tenant of a higher class may go first: the cost of one step."""
        prices = self.config.prices
        return self.settings.max_num_batched_tokens * max(prices.input_token, prices.output_token) * VIRTUAL_UNIT

    # -- 5. close

    def _close(self, left_out: set[str], capped: set[str]) -> None:
        """Advance the virtual time: `left_out` and every tenant whose prompts wait for budget, memory or a seat."""
        num_blocks = self.settings.num_kv_blocks
        for tenant_id, tenant in self.roster.active.items():
            if tenant.prefilling or (
                tenant.may_start
                and tenant_id not in capped
                and (tenant.max_blocks == num_blocks or not self.roster.is_at_ceiling(tenant))
            ):
                left_out.add(tenant_id)
                if tenant.waiting.per_user:
                    tenant.waiting.close_step(tenant.prefilling.values())
        self.shares.close_step(left_out)

    # -- inside

    def _budget(self, now: float) -> StepBudget:
        max_tokens = self.settings.max_num_batched_tokens
        if self._token_budgets is not None:
            max_tokens = next(self._token_budgets, max_tokens)
        return StepBudget(max_tokens, self.step_time, self._objective(now), self.settings.min_prefill_tokens)

    def _objective(self, now: float) -> float | None:
        """The tightest inter-token objective of the tenants that stream, or did a moment ago, in seconds."""
        if not self._is_fair:
            return None
        for tenant_id, tenant in self.roster.running_tenants.items():
            if tenant.inter_token_latency != _NEVER:
                self._held_until[tenant_id] = now + self.settings.objective_hold_seconds
        self._held_until = {tenant_id: until for tenant_id, until in self._held_until.items() if until >= now}
        return min((self.roster.tenant(tenant_id).inter_token_latency for tenant_id in self._held_until), default=None)

    def _service(self, tenant: Tenant) -> int:
        return self.shares.virtual_service(tenant.tenant_id)

    def _schedule_chunk(
        self, tenant: Tenant, request: Request, num_tokens: int, budget: StepBudget, scheduled: list[ScheduledRequest]
    ) -> None:
        """Put the next tokens of a prompt into the batch; the last chunk gives the first output token."""
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        samples = end == request.num_tokens
        scheduled.append(ScheduledRequest(request, start, num_tokens, samples))
        budget.spend(start, num_tokens)
        num_new = max(0, min(end, request.num_prompt_tokens) - max(start, request.num_charged_tokens))
        request.num_charged_tokens += num_new
        tenant.num_prompt_tokens += num_new
        self._charge(tenant, (request,), num_new * self.config.prices.input_token)
        request.num_computed_tokens = end
        if samples:
            request.num_in_flight_tokens += 1
            self._charge_outputs(tenant, (request,))
            self.roster.end_prefill(request)

    def _charge_outputs(self, tenant: Tenant, requests: Sequence[Request], count: int = 1) -> None:
        """Charge `count` outputs of each request (negative: given back, since they were computed past its end)."""
        tenant.num_generation_tokens += count * len(requests)
        self._charge(tenant, requests, count * self.config.prices.output_token)

    def _charge(self, tenant: Tenant, requests: Sequence[Request], cost: int) -> None:
        """Charge each of a tenant's requests: the one place where service is charged."""
        tenant.service += cost * len(requests)
        self.shares.charge(tenant.tenant_id, cost * len(requests), tenant.weight)
        if tenant.waiting.per_user:
            for request in requests:
                tenant.waiting.charge(request, cost)

    def _take_token(self, request: Request, token_id: int) -> None:
        params = request.sampling_params
        request.num_in_flight_tokens -= 1
        request.token_ids.append(token_id)
        if token_id in params.stop_token_ids and request.num_output_tokens > params.min_tokens:
            self._finish(request, FinishReason.STOP, (token_id,))
        elif len(request.token_ids) >= request.max_num_tokens:
            self._finish(request, FinishReason.LENGTH, (token_id,))
        else:
            self._outputs.append(RequestOutput(request_id=request.request_id, token_ids=(token_id,)))

    def _admit(self, request: Request, now: float) -> None:
        self.roster.admit(request, now)
        if request.num_preemptions == 0:
            output = RequestOutput(request_id=request.request_id, num_cached_tokens=request.num_cached_tokens)
            self._outputs.append(output)

    def _preempt(self, request: Request) -> None:
        self.roster.preempt(request)
        self.num_preemptions += 1

    def _finish_oversized(self, request: Request) -> None:
        """End a request that outgrew the cache or its tenant's ceiling while it waited."""
        self._finish(request, FinishReason.LENGTH if request.num_output_tokens else FinishReason.OVERLOADED)

    def _finish(self, request: Request, reason: FinishReason, token_ids: tuple[int, ...] = ()) -> None:
        """The one exit of a request, wherever it is."""
        request.finish_reason = reason
        self.roster.remove(request)
        self._finished.append(request.request_id)
        self._outputs.append(
            RequestOutput(
                request_id=request.request_id,
                token_ids=token_ids,
                finish_reason=reason,
                num_cached_tokens=request.num_cached_tokens,
            )
        )


def _next_position(tenant: Tenant) -> float:
    request = tenant.next_prompt()
    return request.position if request else _NEVER


def _is_at_end(request: Request) -> bool:
    """Whether the output in flight is the request's last, so that there is nothing more to compute."""
    return request.num_computed_tokens + 1 >= request.max_num_tokens
