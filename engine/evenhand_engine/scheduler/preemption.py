"""Preemption: who gives way when memory, seats or patience run out, and when.

Five occasions, each with its victims:

    reclaim   a prompt within its tenant's KV guarantee needs blocks: the tenant holding most beyond its guarantee gives
              way
    service   a tenant is far behind in service and its prompt does not fit: the most over-served tenant gives way, but
              never blocks of its guarantee, only requests past their minimum run, and only if it stays ahead
              afterwards, so that two requests can never preempt each other in turn
    pause     a tenant is beyond the limit: what could be preempted for service keeps its blocks and computes nothing
    growth    a running request needs its next block: somebody must yield, if need be the request itself
    ceiling   the same, but its tenant holds all that it may: one of its own must yield

Of a tenant the least computed request goes first: the least work is lost (vLLM issue 54644 measured half of the
recompute tax to be the choice of the victim).
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.capacity import Fit, KvCapacity
from evenhand_engine.scheduler.fair_share import VIRTUAL_UNIT
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.order import Order
from evenhand_engine.scheduler.request import FinishReason, Request
from evenhand_engine.scheduler.request_table import RequestTable
from evenhand_engine.scheduler.tenant import Tenant


class Preemption:
    """Makes room in memory and among the seats. The moves are the request_table's; the choices are here."""

    def __init__(self, settings: SchedulerSettings, request_table: RequestTable, ledger: Ledger, order: Order) -> None:
        self._settings = settings
        self._request_table = request_table
        self._capacity = request_table.capacity
        self._ledger = ledger
        self._order = order
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR
        self._pausing: list[Tenant] = []  # in this step

    # -- before a step: room for prompts that the last one starved

    def make_room(self, now: float) -> None:
        """For prompts within a KV guarantee, then for the tenant that is furthest behind."""
        for _ in range(self._settings.max_num_seqs):
            if not self._reclaim(now):
                break
        self._serve_furthest_behind(now)

    def _reclaim(self, now: float) -> bool:
        """Start one prompt within its tenant's guarantee, unless the tenant is too far ahead; whether there was one."""
        request_table = self._request_table
        for tenant in sorted(request_table.guaranteed_tenants(), key=self._ledger.service):
            request = tenant.waiting.first((), may_start=tenant.may_start and not self._ledger.is_ahead(tenant))
            if request is None or not self._capacity.is_within_guarantee(request):
                continue
            fit = self._capacity.fit(request)
            if fit in (Fit.FITS, Fit.RESERVED):  # memory or a seat may be held for others, but not its guarantee
                request_table.start(request, now)
                return True
            if fit is Fit.STARVED and self._replace(self._victims_of_reclaim(request), request, now):
                return True
        return False

    def _serve_furthest_behind(self, now: float) -> None:
        """Preempt for the least served tenant while it is owed a place: once because it is far behind, and again while
        somebody that far ahead would still run more for its weight, so that the lead does not grow any more."""
        tenant = self._order.least_served()
        if tenant is None or tenant.prefilling:
            return
        rivals = list(self._request_table.running_tenants.values())
        for _ in range(self._settings.max_num_seqs):
            request = tenant.waiting.first((), may_start=tenant.may_start)
            if request is None or self._capacity.fit(request) not in (Fit.STARVED, Fit.RESERVED):
                return
            limit = self._ledger.service(tenant) + self._cost_of_starting(tenant, request)
            if not self._replace(self._victims_of_service(request, limit, rivals, now), request, now):
                return
            rivals = [r for r in rivals if r.num_running * tenant.weight > tenant.num_running * r.weight]

    def _replace(self, victims: list[Request], request: Request, now: float) -> bool:
        for victim in victims:
            self._request_table.preempt(victim)
        if victims:
            self._request_table.start(request, now)
        return bool(victims)

    def _cost_of_starting(self, tenant: Tenant, request: Request) -> int:
        """Virtual service that the tenant's prompts will be charged once `request` runs too, and the preemption lag."""
        cost_of = self._ledger.prompt_cost
        num_cached = len(self._capacity.blocks.cached_prefix(request)) * self._settings.block_size
        num_spared = min(request.num_prompt_tokens, max(request.num_charged_tokens, num_cached))
        cost = cost_of(num_spared, request.num_prompt_tokens) + self._settings.preemption_lag
        cost += sum(cost_of(r.num_charged_tokens, r.num_prompt_tokens) for r in tenant.prefilling.values())
        return cost * VIRTUAL_UNIT // tenant.weight

    # -- during a step: who is too far ahead pauses

    def pause(self, now: float) -> None:
        """Nothing that could be preempted for service computes while its tenant is too far ahead."""
        if self._ledger.limit is not None:
            self._pausing = [
                tenant for tenant in self._request_table.running_tenants.values() if self._ledger.is_ahead(tenant)
            ]
            for tenant in self._pausing:
                tenant.paused = {request.request_id: request for request in self._preemptible(tenant, now)}

    def resume(self) -> None:
        """End the pause, also of a tenant that has lost all that it ran to the growth of others since it began."""
        for tenant in self._pausing:
            tenant.paused = {}
        self._pausing = []

    # -- during a step: room for running requests to grow

    def grow(self, decodes: Iterable[Request]) -> bool:
        """Give each stream room for its next token, in its last block or a new one, where others or it itself must not
        yield. Whether all have it and nobody yielded; else `KvCapacity.with_room` tells who has it."""
        needy, have_room = self._capacity.without_room(decodes), True
        for request in needy:
            if request.block_table:  # else it was preempted for the growth of another
                have_room &= self._grow(request)
        return have_room

    def _grow(self, request: Request) -> bool:
        """Room for the request's next token; whether there was some. Else others yield for it, or it yields, or nobody can
        and it ends."""
        request_table, capacity, tenant = (
            self._request_table,
            self._capacity,
            self._request_table.tenants[request.tenant_id],
        )
        was_room = True
        while (at_ceiling := capacity.is_at_ceiling(tenant)) or not capacity.blocks.grow(request, request.num_tokens):
            was_room = False
            num_rivals = tenant.num_running if at_ceiling else request_table.num_running
            if num_rivals == 1:
                if request.num_in_flight_tokens == 0:  # else it ends when its last token has been told
                    request_table.finish(request, FinishReason.LENGTH)
                return False
            if at_ceiling:
                victim = _least_computed_first(tenant.running())[0]
            elif self._is_fair:
                victim = self._victim_of_growth(tenant)
            else:
                running = (r for t in request_table.running_tenants.values() for r in t.running())
                victim = max(running, key=lambda request: request.position)
            request_table.preempt(victim)
            if victim is request:
                return False
        return was_room

    # -- the choices

    def _victims_of_reclaim(self, request: Request) -> list[Request]:
        """Victims who make room for a request within its tenant's guarantee; empty if they cannot."""
        beneficiary = self._request_table.tenants[request.tenant_id]
        victims, beyond_guarantee = _Victims(self._capacity, beneficiary, request), self._capacity.num_beyond_guarantee
        tenants = self._request_table.running_tenants.values()
        others = [t for t in tenants if t.tenant_id != request.tenant_id and beyond_guarantee(t) > 0]
        for tenant in sorted(others, key=beyond_guarantee, reverse=True):
            beyond = beyond_guarantee(tenant)
            for victim in _least_computed_first(tenant.running()):
                if victims.suffice or beyond <= 0:
                    break
                beyond -= victims.add(victim)
        return victims.chosen if victims.suffice else []

    def _victims_of_service(self, request: Request, limit: int, rivals: list[Tenant], now: float) -> list[Request]:
        """Victims who make room for a request of a tenant that is far behind; empty if they cannot.

        Only tenants whose virtual service is beyond `limit` give way: what the beneficiary's will be once the prompt
        is charged, and the preemption lag. So who gives way stays ahead by that much.
        """
        beneficiary = self._request_table.tenants[request.tenant_id]
        victims, service = _Victims(self._capacity, beneficiary, request), self._ledger.service
        ahead = [t for t in rivals if t.tenant_id != request.tenant_id and service(t) > limit]
        for tenant in sorted(ahead, key=service, reverse=True):
            for victim in self._preemptible(tenant, now):
                if victims.suffice:
                    return victims.chosen
                victims.add(victim)
        return victims.chosen if victims.suffice else []

    def _preemptible(self, tenant: Tenant, now: float) -> Iterator[Request]:
        """What may be preempted for service, the first victim first: past its minimum run, not preempted too often
        already, and beyond the tenant's guarantee."""
        beyond = self._capacity.num_beyond_guarantee(tenant)
        for request in _least_computed_first(filter(lambda request: self._has_run(request, now), tenant.running())):
            num_blocks = self._capacity.blocks.num_reclaimable_blocks(request)
            if num_blocks <= beyond:
                beyond -= num_blocks
                yield request

    def _has_run(self, request: Request, now: float) -> bool:
        assert request.started_at is not None
        return (
            now - request.started_at >= self._settings.min_run_seconds
            and request.num_preemptions < self._settings.max_preemptions
        )

    def _victim_of_growth(self, owner: Tenant) -> Request:
        """The one who yields a block so that a running request of `owner` can go on; maybe that request itself."""
        holders, beyond_guarantee = (
            list(self._request_table.running_tenants.values()),
            self._capacity.num_beyond_guarantee,
        )
        if beyond_guarantee(owner) < 0:
            tenant = max(holders, key=beyond_guarantee)
        else:
            beyond = [tenant for tenant in holders if beyond_guarantee(tenant) > 0] or holders
            tenant = max(beyond, key=self._ledger.service)
        victims = list(tenant.running())
        spared = [victim for victim in victims if victim.num_preemptions < self._settings.max_preemptions]
        return _least_computed_first(spared or victims)[0]


class _Victims:
    """Victims chosen so far, and whether they make room for a waiting request."""

    def __init__(self, capacity: KvCapacity, tenant: Tenant, request: Request) -> None:
        self.chosen: list[Request] = []
        self._capacity = capacity
        self._request = request
        self._prefix = set(capacity.blocks.cached_prefix(request))  # it needs none of these anew, whoever holds them
        self._released: Counter[int] = Counter()
        self._missing_seats = capacity.num_missing_seats_for(tenant)
        self._missing_blocks = capacity.blocks.num_missing_blocks(request) - capacity.blocks.num_free_blocks

    @property
    def suffice(self) -> bool:
        num_victims = len(self.chosen)
        num_growth_blocks = self._capacity.num_growth_blocks(self._request, self._capacity.num_running - num_victims)
        return self._missing_blocks + num_growth_blocks <= 0 and self._missing_seats <= num_victims

    def add(self, victim: Request) -> int:
        """Choose another; returns how many blocks it frees, those included that only victims held."""
        self._released.update(victim.block_table)
        blocks = self._capacity.blocks
        freed = [block for block in victim.block_table if self._released[block] == blocks.num_references(block)]
        self.chosen.append(victim)
        self._missing_blocks -= sum(block not in self._prefix for block in freed)
        return len(freed)


def _least_computed_first(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: (request.num_computed_tokens, -request.position))
