"""Who gives way when memory or seats run out: pure choices, made by the scheduler between steps.

Four occasions, each with its victims:

    reclaim   a tenant within its KV guarantee needs blocks: the tenant holding most beyond its guarantee gives way
    service   a tenant is far behind in service and its prompt does not fit: the most over-served tenant gives way, but
              never blocks of its guarantee, only requests past their minimum run, and only if it stays ahead
              afterwards, so that two requests can never preempt each other in turn
    growth    a running request needs its next block: somebody must yield, if need be the request itself
    ceiling   the same, but its tenant holds all that it may: one of its own must yield

Of a tenant the least computed request goes first: the least work is lost (vLLM issue 54644 measured half of the
recompute tax to be the choice of the victim).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.roster import Roster
from evenhand_engine.scheduler.tenant import Tenant

VirtualService = Callable[[str], int]


class Preemption:
    """The rules over the tenants' live state. Changes nothing."""

    def __init__(self, settings: SchedulerSettings, roster: Roster, virtual_service: VirtualService) -> None:
        self._settings = settings
        self._roster = roster
        self._blocks = roster.blocks
        self._virtual_service = virtual_service

    def reclaim(self, request: Request, tenants: Iterable[Tenant]) -> list[Request]:
        """Victims who make room for a request within its tenant's guarantee; empty if they cannot."""
        victims = _Victims(self._roster, request)
        others = [t for t in tenants if t.tenant_id != request.tenant_id and self._beyond_guarantee(t) > 0]
        for tenant in sorted(others, key=self._beyond_guarantee, reverse=True):
            beyond = self._beyond_guarantee(tenant)
            for victim in _least_computed_first(tenant.running()):
                if victims.suffice or beyond <= 0:
                    break
                beyond -= victims.add(victim)
        return victims.chosen if victims.suffice else []

    def service(self, request: Request, limit: int, tenants: Iterable[Tenant], now: float) -> list[Request]:
        """Victims who make room for a request of a tenant that is far behind; empty if they cannot.

        Only tenants whose virtual service is beyond `limit` give way: what the beneficiary's will be once the prompt
        is charged, and the preemption lag. So who gives way stays ahead by that much.
        """
        victims = _Victims(self._roster, request)
        ahead = [t for t in tenants if t.tenant_id != request.tenant_id and self._virtual_service(t.tenant_id) > limit]
        for tenant in sorted(ahead, key=lambda t: self._virtual_service(t.tenant_id), reverse=True):
            for victim in self.preemptible(tenant, now):
                if victims.suffice:
                    return victims.chosen
                victims.add(victim)
        return victims.chosen if victims.suffice else []

    def preemptible(self, tenant: Tenant, now: float) -> Iterator[Request]:
        """What may be preempted for service, the first victim first: past its minimum run, not preempted too often
        already, and beyond the tenant's guarantee."""
        beyond = self._beyond_guarantee(tenant)
        for request in _least_computed_first(filter(lambda request: self._has_run(request, now), tenant.running())):
            num_blocks = self._blocks.num_reclaimable_blocks(request)
            if num_blocks <= beyond:
                beyond -= num_blocks
                yield request

    def ceiling(self, owner: Tenant) -> Request:
        """The one who yields a block so that another of the same tenant, which holds all that it may, can go on."""
        return _least_computed_first(owner.running())[0]

    def growth(self, owner: Tenant, tenants: Iterable[Tenant]) -> Request:
        """The one who yields a block so that a running request of `owner` can go on; maybe that request itself."""
        holders = [tenant for tenant in tenants if tenant.num_running]
        if self._held(owner) < owner.guaranteed_blocks:
            victim_tenant = max(holders, key=self._beyond_guarantee)
        else:
            beyond = [tenant for tenant in holders if self._beyond_guarantee(tenant) > 0] or holders
            victim_tenant = max(beyond, key=lambda tenant: self._virtual_service(tenant.tenant_id))
        victims = list(victim_tenant.running())
        spared = [victim for victim in victims if victim.num_preemptions < self._settings.max_preemptions]
        return _least_computed_first(spared or victims)[0]

    def _held(self, tenant: Tenant) -> int:
        return self._blocks.num_held_blocks(tenant.tenant_id)

    def _beyond_guarantee(self, tenant: Tenant) -> int:
        return self._held(tenant) - tenant.guaranteed_blocks

    def _has_run(self, request: Request, now: float) -> bool:
        assert request.started_at is not None
        return (
            now - request.started_at >= self._settings.min_run_seconds
            and request.num_preemptions < self._settings.max_preemptions
        )


class _Victims:
    """Victims chosen so far, and whether they make room for a waiting request."""

    def __init__(self, roster: Roster, request: Request) -> None:
        self.chosen: list[Request] = []
        self._roster = roster
        self._request = request
        self._prefix = set(roster.blocks.cached_prefix(request))  # it needs none of these anew, whoever holds them
        self._released: Counter[int] = Counter()
        self._missing_blocks = roster.blocks.num_missing_blocks(request) - roster.blocks.num_free_blocks

    @property
    def suffice(self) -> bool:
        num_victims = len(self.chosen)
        num_growth_blocks = self._roster.num_growth_blocks(self._request, self._roster.num_running - num_victims)
        return self._missing_blocks + num_growth_blocks <= 0 and self._roster.num_missing_seats <= num_victims

    def add(self, victim: Request) -> int:
        """Choose another; returns how many blocks it frees, those included that only victims held."""
        self._released.update(victim.block_table)
        blocks = self._roster.blocks
        freed = [block for block in victim.block_table if self._released[block] == blocks.num_references(block)]
        self.chosen.append(victim)
        self._missing_blocks -= sum(block not in self._prefix for block in freed)
        return len(freed)


def _least_computed_first(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: (request.num_computed_tokens, -request.position))
