"""Relief: makes room in memory or among the seats, by the choices of preemption.py."""

from collections.abc import Iterable

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.fair_queue import FairQueue
from evenhand_engine.scheduler.fair_share import VIRTUAL_UNIT
from evenhand_engine.scheduler.preemption import Preemption
from evenhand_engine.scheduler.request import FinishReason, Request
from evenhand_engine.scheduler.roster import Fit, Roster
from evenhand_engine.scheduler.tenant import Tenant


class Relief:
    """Between steps: room for a tenant that the last step starved, and for running requests to grow."""

    def __init__(self, settings: SchedulerSettings, roster: Roster, queue: FairQueue) -> None:
        self._settings = settings
        self._roster = roster
        self._queue = queue
        self._preemption = Preemption(settings, roster, queue.shares.virtual_service)
        self._paused: list[Tenant] = []
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR

    def relieve(self, now: float) -> None:
        """Make room for prompts within a KV guarantee, then for the tenant that is furthest behind."""
        for _ in range(self._settings.max_num_seqs):
            if not self._reclaim(now):
                break
        self._serve_furthest_behind(now)

    def pause(self, now: float) -> None:
        """Nothing that could be preempted for service computes while its tenant is too far ahead."""
        has_limit = self._queue.limit is not None
        self._paused = list(filter(self._queue.is_ahead, self._roster.running_tenants.values())) if has_limit else []
        for tenant in self._paused:
            tenant.paused = {request.request_id: request for request in self._preemption.preemptible(tenant, now)}

    def resume(self) -> None:
        """End the pause."""
        for tenant in self._paused:
            tenant.paused = {}

    def grow(self, decodes: Iterable[Request]) -> None:
        """Give each stream room for its next token, in its last block or a new one, where others or it itself must not
        yield; `has_room` tells who has it."""
        for request in [request for request in decodes if not self.has_room(request)]:
            if request.block_table:  # else it was preempted for the growth of another
                self._grow(request)

    def has_room(self, request: Request) -> bool:
        """Whether the request runs, on blocks with room for its next token."""
        return len(request.block_table) * self._settings.block_size > request.num_computed_tokens

    def _reclaim(self, now: float) -> bool:
        """Start one prompt within its tenant's guarantee, unless the tenant is too far ahead; whether there was one."""
        roster = self._roster
        for tenant in sorted(roster.guaranteed_tenants(), key=self._queue.service):
            request = tenant.waiting.first((), may_start=tenant.may_start and not self._queue.is_ahead(tenant))
            if request is None or not roster.is_within_guarantee(request):
                continue
            fit = roster.fit(request)
            if fit is Fit.FITS:  # memory may be held for another's prompt, but not its guarantee
                roster.admit(request, now)
                return True
            running = roster.running_tenants.values()
            if fit is Fit.STARVED and self._replace(self._preemption.reclaim(request, running), request, now):
                return True
        return False

    def _serve_furthest_behind(self, now: float) -> None:
        """Preempt for the least served tenant while it is owed a place: once because it is far behind, and again while
        somebody that far ahead would still run more for its weight, so that the lead does not grow any more."""
        tenant = self._queue.least_served_contender()
        if tenant is None or tenant.prefilling:
            return
        rivals = list(self._roster.running_tenants.values())
        for _ in range(self._settings.max_num_seqs):
            request = tenant.waiting.first((), may_start=tenant.may_start)
            if request is None or self._roster.fit(request) is not Fit.STARVED:
                return
            limit = self._queue.service(tenant) + self._cost_of_starting(tenant, request)
            if not self._replace(self._preemption.service(request, limit, rivals, now), request, now):
                return
            rivals = [r for r in rivals if r.num_running * tenant.weight > tenant.num_running * r.weight]

    def _replace(self, victims: list[Request], request: Request, now: float) -> bool:
        for victim in victims:
            self._roster.preempt(victim)
        if victims:
            self._roster.admit(request, now)
        return bool(victims)

    def _cost_of_starting(self, tenant: Tenant, request: Request) -> int:
        """Virtual service that the tenant's prompts will be charged once `request` runs too, and the preemption lag."""
        num_cached = len(self._roster.blocks.cached_prefix(request)) * self._settings.block_size
        num_tokens = max(0, request.num_prompt_tokens - max(request.num_charged_tokens, num_cached))
        num_tokens += sum(max(0, r.num_prompt_tokens - r.num_charged_tokens) for r in tenant.prefilling.values())
        cost = num_tokens * self._queue.prices.input_token + self._settings.preemption_lag
        return cost * VIRTUAL_UNIT // tenant.weight

    def _grow(self, request: Request) -> None:
        """Room for the request's next token: others yield for it, or it yields, or nobody can and it ends."""
        roster, tenant = self._roster, self._roster.tenants[request.tenant_id]
        while (at_ceiling := roster.is_at_ceiling(tenant)) or not roster.blocks.grow(request, request.num_tokens):
            num_rivals = tenant.num_running if at_ceiling else roster.num_running
            if num_rivals == 1:
                if request.num_in_flight_tokens == 0:  # else it ends when its last token has been told
                    roster.finish(request, FinishReason.LENGTH)
                return
            if at_ceiling:
                victim = self._preemption.ceiling(tenant)
            elif self._is_fair:
                victim = self._preemption.growth(tenant, roster.running_tenants.values())
            else:
                running = (r for t in roster.running_tenants.values() for r in t.running())
                victim = max(running, key=lambda request: request.position)
            roster.preempt(victim)
            if victim is request:
                return
