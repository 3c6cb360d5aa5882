"""Admission: which prompts start in one step, and who is left out or passed over for want of memory or a seat.

Made anew for each step; the scheduler asks it for the next prompt until the token budget is spent. The order says whose turn
it is, the capacity whether there is room; what is left out here waits for the next step, or for preemption.
"""

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.capacity import Fit
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.order import Order
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.request_table import RequestTable
from evenhand_engine.scheduler.tenant import Tenant

_NEVER = float("inf")
_MAX_WITHOUT_ROOM = 4  # prompts without room that one step looks at before it stops admitting
_LARGE_PROMPT = 8  # a prompt is large if it needs more than the cache divided by this


class Admission:
    """Chooses prompts, and starts those that wait.

    Memory is held for a prompt without room: only a large one is bypassed by the next tenant's, and only so often. Seats that a
    tenant with many leaves are for tenants with few, as long as these are not ahead of it by more than the slack.
    """

    def __init__(
        self, settings: SchedulerSettings, request_table: RequestTable, ledger: Ledger, order: Order, now: float
    ) -> None:
        self._settings = settings
        self._request_table = request_table
        self._capacity = request_table.capacity
        self._ledger = ledger
        self._order = order
        self._now = now
        self._is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR
        self._may_start_new = self._has_seat and settings.scheduling_policy is not SchedulingPolicy.STATIC
        self._without_room: dict[str, Tenant] = {}
        self._held_back: set[str] = set()
        self._reserve_limit = _NEVER  # virtual service of a tenant that left a seat, and the slack

    @property
    def has_left_out(self) -> bool:
        """Whether a prompt was left out for want of memory or a seat."""
        return bool(self._without_room) or not self._may_start_new or self._reserve_limit != _NEVER

    def next_prompt(self) -> tuple[Tenant, Request] | None:
        """Whose prompt computes next, and which: one in progress or, not `started_at` yet, one that may start."""
        blocked = self._without_room.keys() | self._held_back
        tenant = self._order.next_tenant(blocked, may_start_new=self._may_start_new)
        if tenant is None:
            return None
        may_start = self._may_start_new and tenant.tenant_id not in blocked and not self._ledger.is_ahead(tenant)
        request = tenant.next_prompt(may_start=may_start)
        assert request is not None
        return tenant, request

    def start(self, tenant: Tenant, request: Request) -> bool:
        """Start the prompt if it may; False: it was left out, or has ended, and somebody else is next."""
        fit = self._capacity.fit(request)
        if fit is Fit.NEVER:
            self._request_table.finish_oversized(request)
        elif fit in (Fit.CAPPED, Fit.UNSETTLED):
            self._held_back.add(tenant.tenant_id)
        elif self._ledger.service(tenant) > self._reserve_limit:
            self._may_start_new = False
        elif fit is Fit.RESERVED:
            self._held_back.add(tenant.tenant_id)
            self._reserve_limit = min(self._reserve_limit, self._ledger.service(tenant) + self._ledger.slack)
        elif fit is Fit.STARVED:
            self._without_room[tenant.tenant_id] = tenant
            self._may_start_new = self._may_bypass(tenant, request) and len(self._without_room) < _MAX_WITHOUT_ROOM
            if not self._may_start_new and self._is_fair:
                self._start_who_is_behind(tenant)
        else:
            self._request_table.start(request, self._now)
            for bypassed in self._without_room.values():
                bypassed.num_bypasses += 1
            self._may_start_new = self._has_seat
            return True
        return False

    @property
    def _has_seat(self) -> bool:
        return self._capacity.num_missing_seats <= 0

    def _start_who_is_behind(self, tenant: Tenant) -> None:
        """Memory that is held for `tenant`, who went first by class, deadline or prefix, is not held against the least
        served: else that one waits for who is ahead of it, and once all that runs is paused for its sake, for ever."""
        least = self._order.least_served()
        if least is None or least is tenant or least.prefilling:
            return
        request = least.next_prompt()
        if request is not None and self._capacity.fit(request) is Fit.FITS:
            self._request_table.start(request, self._now)

    def _may_bypass(self, tenant: Tenant, request: Request) -> bool:
        """Whether others may start past a prompt without room: what is held for it lies idle, so for a small one little."""
        blocks = self._request_table.blocks
        is_large = blocks.num_missing_blocks(request) * _LARGE_PROMPT > blocks.num_blocks
        return self._is_fair and is_large and tenant.num_bypasses < self._settings.max_bypasses
