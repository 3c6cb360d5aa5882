"""Relief: makes room in memory or among the seats, by the choices of preemption.py."""

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.fair_queue import FairQueue
from evenhand_engine.fair_share import VIRTUAL_UNIT
from evenhand_engine.preemption import Preemption
from evenhand_engine.request import FinishReason, Request
from evenhand_engine.roster import Fit, Roster
from evenhand_engine.tenant import Tenant


class Relief:
    """Between steps: room for a tenant that the last step starved, and for running requests to grow."""

    def __init__(self, settings: SchedulerSettings, roster: Roster, queue: FairQueue) -> None:
        self._settings = settings
        self._roster = roster
        self._queue = queue
        self._preemption = Preemption(settings, roster.blocks, queue.shares.virtual_service)
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR

    def relieve(self, now: float) -> None:
        """Make room for a tenant within its KV guarantee, or for the one that is furthest behind; one prompt a step."""
        roster = self._roster
        running = roster.running_tenants.values()
        num_seats = roster.num_missing_seats
        for tenant in sorted(filter(_may_start_another, roster.guaranteed_tenants()), key=self._queue.service):
            request = tenant.next_prompt()
            if request and request.started_at is None and roster.is_within_guarantee(request):
                fit = roster.fit(request)
                if fit is Fit.FITS:  # memory may be held for another's prompt, but not its guarantee
                    roster.admit(request, now)
                    return
                num_blocks = roster.num_missing_blocks(request)
                if fit is Fit.STARVED and self._replace(
                    self._preemption.reclaim(tenant, running, num_blocks, num_seats), request, now
                ):
                    return
        for tenant in filter(_may_start_another, self._queue.in_order()):
            request = tenant.next_prompt()
            break
        else:
            return
        if request and request.started_at is None and roster.fit(request) is Fit.STARVED:
            cost = (self._prompt_cost(request) + self._settings.preemption_lag) * VIRTUAL_UNIT // tenant.weight
            num_blocks = roster.num_missing_blocks(request)
            self._replace(self._preemption.service(tenant, cost, running, num_blocks, num_seats, now), request, now)

    def grow_decodes(self) -> None:
        """A block for every generating request whose next token needs one."""
        block_size = self._settings.block_size
        growing = [
            request
            for tenant in self._roster.running_tenants.values()
            for request in tenant.decoding.values()
            if len(request.block_table) * block_size < request.num_computed_tokens + 1 and not request.is_at_end
        ]
        for request in growing:
            if request.block_table:  # else it was preempted for the growth of another
                self._grow(request)

    def _replace(self, victims: list[Request], request: Request, now: float) -> bool:
        for victim in victims:
            self._roster.preempt(victim)
        if victims:
            self._roster.admit(request, now)
        return bool(victims)

    def _prompt_cost(self, request: Request) -> int:
        """What the prompt of a waiting request will still be charged."""
        num_cached = len(self._roster.blocks.cached_prefix(request)) * self._settings.block_size
        num_tokens = request.num_prompt_tokens - max(request.num_charged_tokens, num_cached)
        return max(0, num_tokens) * self._queue.prices.input_token

    def _grow(self, request: Request) -> None:
        """Room for the request's next token: others yield for it, or it yields, or nobody can and it ends."""
        roster, tenant = self._roster, self._roster.tenants[request.tenant_id]
        while (at_ceiling := roster.is_at_ceiling(tenant)) or not roster.blocks.grow(request, request.num_tokens):
            num_rivals = tenant.num_running if at_ceiling else roster.num_running
            if num_rivals == 1:
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


def _may_start_another(tenant: Tenant) -> bool:
    return len(tenant.waiting) > 0 and tenant.may_start
