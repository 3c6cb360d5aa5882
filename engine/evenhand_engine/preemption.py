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

from collections.abc import Callable, Iterable

from evenhand_engine.block_manager import BlockManager
from evenhand_engine.config import SchedulerSettings
from evenhand_engine.request import Request
from evenhand_engine.tenant import Tenant

VirtualService = Callable[[str], int]


class Preemption:
    """The rules over the tenants' live state. Changes nothing."""

    def __init__(self, settings: SchedulerSettings, blocks: BlockManager, virtual_service: VirtualService) -> None:
        self._settings = settings
        self._blocks = blocks
        self._virtual_service = virtual_service

    def reclaim(self, beneficiary: Tenant, tenants: Iterable[Tenant], num_blocks: int, num_seats: int) -> list[Request]:
        """Victims who clear `num_blocks` and `num_seats` for a tenant within its guarantee; empty if it cannot be."""
        victims = _Victims(self._blocks, num_blocks, num_seats)
        others = [tenant for tenant in tenants if tenant is not beneficiary and self._beyond_guarantee(tenant) > 0]
        for tenant in sorted(others, key=self._beyond_guarantee, reverse=True):
            beyond = self._beyond_guarantee(tenant)
            for victim in _least_computed_first(tenant.running()):
                if victims.suffice or beyond <= 0:
                    break
                beyond -= victims.add(victim)
        return victims.chosen if victims.suffice else []

    def service(
        self, beneficiary: Tenant, cost: int, tenants: Iterable[Tenant], num_blocks: int, num_seats: int, now: float
    ) -> list[Request]:
        """Victims who clear `num_blocks` and `num_seats` for a tenant that is far behind; empty if it cannot be.

        `cost` is what the waiting prompt will add to the beneficiary's virtual service, `preemption_lag` included:
        a tenant gives way only if it stays ahead by that much.
        """
        limit = self._virtual_service(beneficiary.tenant_id) + cost
        victims = _Victims(self._blocks, num_blocks, num_seats)
        ahead = [t for t in tenants if t is not beneficiary and self._virtual_service(t.tenant_id) > limit]
        for tenant in sorted(ahead, key=lambda t: self._virtual_service(t.tenant_id), reverse=True):
            beyond = self._beyond_guarantee(tenant)
            for victim in _least_computed_first(filter(lambda r: self._has_run(r, now), tenant.running())):
                freed = self._blocks.num_reclaimable_blocks(victim)
                if victims.suffice:
                    return victims.chosen
                if freed <= beyond:
                    beyond -= victims.add(victim)
        return victims.chosen if victims.suffice else []

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
    """Victims chosen so far, and whether they free enough."""

    def __init__(self, blocks: BlockManager, num_blocks: int, num_seats: int) -> None:
        self.chosen: list[Request] = []
        self._blocks = blocks
        self._missing_blocks = num_blocks
        self._missing_seats = num_seats

    @property
    def suffice(self) -> bool:
        return self._missing_blocks <= 0 and self._missing_seats <= 0

    def add(self, request: Request) -> int:
        freed = self._blocks.num_reclaimable_blocks(request)
        self.chosen.append(request)
        self._missing_blocks -= freed
        self._missing_seats -= 1
        return freed


def _least_computed_first(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: (request.num_computed_tokens, -request.position))
