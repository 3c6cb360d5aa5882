"""FairQueue: the order of tenants by weighted service: who is charged what, who computes next, who was left out."""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice, takewhile

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.fair_share import VIRTUAL_UNIT, FairShare, Place
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.roster import Fit, Roster
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_policy.config import LatencyClass, Prices

_NEVER = float("inf")
_MAX_RIVALS = 16  # of the tenants within the slack, how many are compared by deadline and cached prefix


class FairQueue:
    """Charges tenants and their users, and chooses between tenants. The one place where service is charged.

    Attributes:
        shares: the tenants' virtual service.
        prices: cost of an input and of an output token.
        limit: virtual service beyond which a tenant may compute nothing in this step; None: nobody is that far ahead.
    """

    def __init__(self, settings: SchedulerSettings, shares: FairShare, roster: Roster) -> None:
        self.shares = shares
        self.prices = Prices()
        self.limit: int | None = None
        self._settings = settings
        self._roster = roster
        self._charged_per_user: dict[str, Tenant] = {}  # in this step
        self._is_congested = False  # whether the last step left somebody out
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR

    def service(self, tenant: Tenant) -> int:
        """The tenant's virtual service, in VIRTUAL_UNITs."""
        return self.shares.virtual_service(tenant.tenant_id)

    def lead(self, weight: int) -> int:
        """How far ahead of a backlogged tenant of this weight another may go on computing: the slack, the longest
        prompt and the preemption lag. So before anybody must pause, preemption may serve who is behind."""
        behind = self._settings.max_model_len * self.prices.input_token + self._settings.preemption_lag
        return self._slack + behind * VIRTUAL_UNIT // weight

    def lag_bound(self) -> int:
        """How far behind any other a backlogged tenant may be now, but for what exempt requests still compute."""
        roster, settings = self._roster, self._settings
        lightest = min((t.weight for t in (*roster.active.values(), *roster.running_tenants.values())), default=1)
        step = settings.max_num_batched_tokens * self.prices.input_token
        step += settings.max_num_seqs * self.prices.output_token
        return self.lead(lightest) + step * VIRTUAL_UNIT // lightest

    def is_ahead(self, tenant: Tenant) -> bool:
        """Whether the tenant is too far ahead to compute."""
        return self.limit is not None and self.service(tenant) > self.limit

    # -- charges

    def charge_prompt(self, tenant: Tenant, request: Request, start: int, end: int) -> None:
        """Charge those of the tokens [start, end) that are prompt and were never computed before."""
        num_new = max(0, min(end, request.num_prompt_tokens) - max(start, request.num_charged_tokens))
        request.num_charged_tokens += num_new
        tenant.num_prompt_tokens += num_new
        self._charge(tenant, (request,), num_new * self.prices.input_token)

    def correct_prompt(self, tenant: Tenant, request: Request, num_tokens: int) -> None:
        """A prompt that was charged by an estimate turns out to cost `num_tokens`: more is charged, less given back."""
        num_new = num_tokens - request.num_charged_tokens
        request.num_charged_tokens = num_tokens
        tenant.num_prompt_tokens += num_new
        self._charge(tenant, (request,), num_new * self.prices.input_token)

    def output_cost(self, tenant: Tenant, request: Request) -> int:
        """By how much the request's next output raises its tenant's virtual service."""
        return self.prices.output_token * VIRTUAL_UNIT // tenant.weight

    def charge_outputs(self, tenant: Tenant, requests: Sequence[Request], count: int = 1) -> None:
        """Charge `count` outputs of each request (negative: given back, since they were computed past its end)."""
        tenant.num_generation_tokens += count * len(requests)
        self._charge(tenant, requests, count * self.prices.output_token)

    def _charge(self, tenant: Tenant, requests: Sequence[Request], cost: int) -> None:
        tenant.service += cost * len(requests)
        self.shares.charge(tenant.tenant_id, cost * len(requests), tenant.weight)
        if tenant.waiting.per_user:
            self._charged_per_user[tenant.tenant_id] = tenant
            for request in requests:
                tenant.waiting.charge(request, cost)

    # -- order

    def open_step(self) -> None:
        """Set the limit of the step that begins: as far ahead as one may be of the least served who contends, or whose
        streams may have to wait for another's objective."""
        self.limit = None
        if self._is_fair and self._is_congested:
            prompts = self.least_served_contender()
            streams = min(self._streaming_for_an_objective(), key=self.service, default=None)
            if tenant := min(filter(None, (prompts, streams)), key=self.service, default=None):
                self.limit = self.service(tenant) + self.lead(tenant.weight)

    def _streaming_for_an_objective(self) -> list[Tenant]:
        """Tenants with streams, if one of them has an inter-token objective, so that others' may be left out."""
        streaming = [tenant for tenant in self._roster.running_tenants.values() if tenant.decoding]
        return streaming if any(tenant.inter_token_latency != _NEVER for tenant in streaming) else []

    def contends(self, tenant: Tenant) -> bool:
        """Whether the tenant has a prompt that computes, or waits for others and not for its own limits."""
        if tenant.prefilling:
            return True
        request = tenant.next_prompt()
        return request is not None and self._roster.fit(request) in (Fit.FITS, Fit.STARVED, Fit.UNSETTLED)

    def least_served_contender(self) -> Tenant | None:
        """Who is furthest behind, of those that contend."""
        in_order = (self._roster.active[tenant_id] for _, _, tenant_id in self.shares.in_order())
        return next(filter(self.contends, in_order), None)

    def next_tenant(self, blocked: Collection[str], *, may_admit: bool) -> Tenant | None:
        """Whose prompt computes next; `blocked` tenants, or all without `may_admit`, can only go on with those begun.

        Fair: the least virtual service; among tenants within the slack of that the higher latency class, then the
        nearer deadline, then the longer cached prefix, before it is evicted. So these decide when inside the bound,
        never how much over time. Else: the oldest prompt.
        """
        if not self._is_fair:
            return self._oldest(blocked, may_admit=may_admit)
        by_class = self._eligible(blocked) if may_admit else self._begun()
        heads = [next(tenants, None) for tenants in by_class]
        limit = min((self.service(head) for head in heads if head), default=0) + self._slack
        for head, others in zip(heads, by_class, strict=True):
            if head and self.service(head) <= limit:
                near = takewhile(lambda tenant: self.service(tenant) <= limit, chain((head,), others))
                return min(islice(near, _MAX_RIVALS), key=self._urgency)
        return None

    def _urgency(self, tenant: Tenant) -> tuple[float, int]:
        """Deadline, then cached prefix. What a preempted request left in the cache does not count: it gave way to
        somebody further behind."""
        request = tenant.next_prompt()
        is_new = request is not None and request.started_at is None and request.num_preemptions == 0
        return tenant.deadline, -self._roster.blocks.num_expected_hits(request) if request and is_new else 0

    def close_step(self, left_out: set[str]) -> None:
        """Advance the virtual time to the least of `left_out` and of the tenants that still contend."""
        if tenant := self.least_served_contender():
            left_out.add(tenant.tenant_id)
        self._is_congested = bool(left_out)
        self.shares.close_step(left_out)
        for charged in self._charged_per_user.values():
            charged.waiting.close_step(charged.prefilling.values())
        self._charged_per_user.clear()

    def _eligible(self, blocked: Collection[str]) -> list[Iterator[Tenant]]:
        """By class, the tenants with a prompt that may compute now, least served first."""
        active = self._roster.active

        def of_class(line: Iterator[Place]) -> Iterator[Tenant]:
            for _, _, tenant_id in line:
                tenant = active[tenant_id]
                if tenant.begun() or (tenant.may_start and tenant_id not in blocked and not self.is_ahead(tenant)):
                    yield tenant

        return [of_class(line) for line in self.shares.lines()]

    def _begun(self) -> list[Iterator[Tenant]]:
        """By class, the tenants with a prompt in progress, least served first."""
        tenants = sorted((t for t in self._roster.prefilling_tenants.values() if t.begun()), key=self.service)
        return [iter([t for t in tenants if t.class_rank == rank]) for rank in range(len(LatencyClass))]

    def _oldest(self, blocked: Collection[str], *, may_admit: bool) -> Tenant | None:
        tenants = (self._roster.active if may_admit else self._roster.prefilling_tenants).values()
        return min(
            (t for t in tenants if t.prefilling or (may_admit and t.may_start and t.tenant_id not in blocked)),
            key=_next_position,
            default=None,
        )

    @property
    def _slack(self) -> int:
        """How far ahead of the least served a tenant of a higher class may go first: the cost of one step."""
        dearest = max(self.prices.input_token, self.prices.output_token)
        return self._settings.max_num_batched_tokens * dearest * VIRTUAL_UNIT


def _next_position(tenant: Tenant) -> float:
    request = tenant.next_prompt()
    return request.position if request else _NEVER
