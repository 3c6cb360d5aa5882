"""Order: whose prompt computes next. It asks the ledger who is behind, and the capacity who could start."""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice, takewhile

from evenhand_engine.scheduler.capacity import Capacity, Fit
from evenhand_engine.scheduler.fair_share import Place
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_policy.config import LatencyClass

_NEVER = float("inf")
_MAX_RIVALS = 16  # of the tenants within the slack, how many are compared by deadline and cached prefix


class Order:
    """Chooses between tenants; changes nothing.

    Fair: the least virtual service; among tenants within the slack of that the higher latency class, then the nearer
    deadline, then the longer cached prefix, before it is evicted. So these decide when inside the bound, never how
    much over time. Else: the oldest prompt.
    """

    def __init__(
        self,
        ledger: Ledger,
        capacity: Capacity,
        active: Mapping[str, Tenant],
        running: Mapping[str, Tenant],
        *,
        is_fair: bool,
    ) -> None:
        """`active`: tenants with a prompt that waits or is in progress, as the ledger has them in line; `running`: those
        with a running request; both by id, as they are at any time."""
        self._ledger = ledger
        self._capacity = capacity
        self._active = active
        self._running = running
        self._is_fair = is_fair

    def contends(self, tenant: Tenant) -> bool:
        """Whether the tenant has a prompt that computes, or waits for others and not for its own limits."""
        if tenant.prefilling:
            return True
        request = tenant.next_prompt()
        return request is not None and self._capacity.fit(request) not in (Fit.CAPPED, Fit.NEVER)

    def least_served(self) -> Tenant | None:
        """Who is furthest behind, of those whose prompts contend."""
        if not self._active:
            return None
        in_order = (self._active[tenant_id] for _, _, tenant_id in self._ledger.shares.in_order())
        return next(filter(self.contends, in_order), None)

    def least_served_of_all(self) -> Tenant | None:
        """The same of those, too, whose streams may have to wait for another's inter-token objective."""
        contenders = [self.least_served(), *self._streaming_for_an_objective()]
        return min(filter(None, contenders), key=self._ledger.service, default=None)

    def _streaming_for_an_objective(self) -> list[Tenant]:
        """Tenants with streams, if one of them has an inter-token objective, so that others' may be left out."""
        streaming = [tenant for tenant in self._running.values() if tenant.decoding]
        return streaming if any(tenant.inter_token_latency != _NEVER for tenant in streaming) else []

    def next_tenant(self, blocked: Collection[str], *, may_start_new: bool) -> Tenant | None:
        """Whose prompt computes next; `blocked` tenants, or all without `may_start_new`, can only go on with those begun."""
        if not self._active:
            return None
        if not self._is_fair:
            return self._oldest(blocked, may_start_new=may_start_new)
        by_class = self._eligible(blocked) if may_start_new else self._in_progress()
        heads = [next(tenants, None) for tenants in by_class]
        service = self._ledger.service
        limit = min((service(head) for head in heads if head), default=0) + self._ledger.slack
        for head, others in zip(heads, by_class, strict=True):
            if head and service(head) <= limit:
                near = takewhile(lambda tenant: service(tenant) <= limit, chain((head,), others))
                return min(islice(near, _MAX_RIVALS), key=self._urgency)
        return None

    def _urgency(self, tenant: Tenant) -> tuple[float, int]:
        """Deadline, then cached prefix. What a preempted request left in the cache does not count: it gave way to
        somebody further behind."""
        request = tenant.next_prompt()
        is_new = request is not None and request.started_at is None and request.num_preemptions == 0
        return tenant.deadline, -self._capacity.num_expected_hits(request) if request and is_new else 0

    def _eligible(self, blocked: Collection[str]) -> list[Iterator[Tenant]]:
        """By class, the tenants with a prompt that may compute now, least served first."""

        def of_class(line: Iterator[Place]) -> Iterator[Tenant]:
            for _, _, tenant_id in line:
                tenant = self._active[tenant_id]
                may_start = tenant.may_start and tenant_id not in blocked and not self._ledger.is_ahead(tenant)
                if may_start or tenant.in_progress():
                    yield tenant

        return [of_class(line) for line in self._ledger.shares.lines()]

    def _in_progress(self) -> list[Iterator[Tenant]]:
        """By class, the tenants with a prompt in progress, least served first."""
        tenants = sorted((t for t in self._running.values() if t.in_progress()), key=self._ledger.service)
        return [iter([t for t in tenants if t.class_rank == rank]) for rank in range(len(LatencyClass))]

    def _oldest(self, blocked: Collection[str], *, may_start_new: bool) -> Tenant | None:
        def has_prompt(tenant: Tenant) -> bool:
            may_start = may_start_new and tenant.may_start and tenant.tenant_id not in blocked
            return bool(tenant.in_progress()) or (may_start and len(tenant.waiting) > 0)

        tenants = (self._active if may_start_new else self._running).values()
        return min(filter(has_prompt, tenants), key=_next_position, default=None)


def _next_position(tenant: Tenant) -> float:
    request = tenant.next_prompt()
    return request.position if request else _NEVER
