"""FairQueue: the order of tenants by weighted service: who is charged what, who computes next, who was left out."""

from collections.abc import Collection, Sequence

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.fair_share import VIRTUAL_UNIT, FairShare
from evenhand_engine.request import Request
from evenhand_engine.roster import Roster
from evenhand_engine.tenant import Tenant
from evenhand_policy.config import Prices

_NEVER = float("inf")


class FairQueue:
    """Charges tenants and their users, and chooses between tenants. The one place where service is charged.

    Attributes:
        shares: the tenants' virtual service.
        prices: cost of an input and of an output token.
    """

    def __init__(self, settings: SchedulerSettings, roster: Roster) -> None:
        self.shares = FairShare()
        self.prices = Prices()
        self._settings = settings
        self._roster = roster
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR

    def service(self, tenant: Tenant) -> int:
        """The tenant's virtual service, in VIRTUAL_UNITs."""
        return self.shares.virtual_service(tenant.tenant_id)

    # -- charges

    def charge_prompt(self, tenant: Tenant, request: Request, start: int, end: int) -> None:
        """Charge those of the tokens [start, end) that are prompt and were never computed before."""
        num_new = max(0, min(end, request.num_prompt_tokens) - max(start, request.num_charged_tokens))
        request.num_charged_tokens += num_new
        tenant.num_prompt_tokens += num_new
        self._charge(tenant, (request,), num_new * self.prices.input_token)

    def charge_outputs(self, tenant: Tenant, requests: Sequence[Request], count: int = 1) -> None:
        """Charge `count` outputs of each request (negative: given back, since they were computed past its end)."""
        tenant.num_generation_tokens += count * len(requests)
        self._charge(tenant, requests, count * self.prices.output_token)

    def _charge(self, tenant: Tenant, requests: Sequence[Request], cost: int) -> None:
        tenant.service += cost * len(requests)
        self.shares.charge(tenant.tenant_id, cost * len(requests), tenant.weight)
        if tenant.waiting.per_user:
            for request in requests:
                tenant.waiting.charge(request, cost)

    # -- order

    def next_tenant(self, blocked: Collection[str], *, may_admit: bool) -> Tenant | None:
        """Whose prompt computes next; `blocked` tenants, or all without `may_admit`, can only go on with those begun.

        Fair: the least virtual service; among tenants within the slack of that the higher latency class, then the
        nearer deadline. So a class decides when inside the bound, never how much over time. Else: the oldest prompt.
        """
        if may_admit:
            tenants = [
                tenant
                for tenant_id, tenant in self._roster.active.items()
                if tenant.prefilling or (tenant.may_start and tenant_id not in blocked)
            ]
        else:
            tenants = list(self._roster.prefilling_tenants.values())
        if len(tenants) < 2:
            return tenants[0] if tenants else None
        if not self._is_fair:
            return min(tenants, key=_next_position)
        services = [self.service(tenant) for tenant in tenants]
        limit = min(services) + self._slack
        near = [
            (tenant.class_rank, tenant.deadline, service, index)
            for index, (tenant, service) in enumerate(zip(tenants, services, strict=True))
            if service <= limit
        ]
        return tenants[min(near)[3]]

    def close_step(self, left_out: set[str], capped: Collection[str]) -> None:
        """Advance the virtual time: `left_out` and every tenant whose prompts wait for budget, memory or a seat;
        `capped` tenants are held back by their own ceiling."""
        for tenant_id, tenant in self._roster.active.items():
            if tenant.prefilling or (
                tenant.may_start and tenant_id not in capped and not self._roster.is_at_ceiling(tenant)
            ):
                left_out.add(tenant_id)
                if tenant.waiting.per_user:
                    tenant.waiting.close_step(tenant.prefilling.values())
        self.shares.close_step(left_out)

    @property
    def _slack(self) -> int:
        """How far ahead of the least served a tenant of a higher class may go first: the cost of one step."""
        dearest = max(self.prices.input_token, self.prices.output_token)
        return self._settings.max_num_batched_tokens * dearest * VIRTUAL_UNIT


def _next_position(tenant: Tenant) -> float:
    request = tenant.next_prompt()
    return request.position if request else _NEVER
