"""Capacity: whether a request can start now, and what is missing. Seats and KV blocks in the engine.

What a request needs to start beyond a tenant's guarantee, and what it leaves:

    ├── its tokens and one more ──┤── room to grow of all that run ──┤
    new blocks   revived blocks     growth_blocks for each

Of 32 seats and more one in 32 is left by tenants that have many, so that one that comes finds a seat at once instead of waiting until
somebody's request ends.
"""

from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import Protocol

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.block_manager import BlockManager
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.tenant import Tenant


class Fit(Enum):
    """Whether a waiting request can start now."""

    FITS = auto()
    CAPPED = auto()  # its tenant's own ceiling holds it back: nobody else is to blame, no credit is earned
    STARVED = auto()  # no seat, or not enough free blocks
    RESERVED = auto()  # it would fit, but the seats that are free are for tenants that have few
    UNSETTLED = auto()  # the next block of its prompt, or a token it sampled before it was preempted, is in flight
    NEVER = auto()  # larger than the cache or its tenant's ceiling


_SEATS_PER_RESERVED = 32
_MANY = 8  # a tenant has many seats if it has more than one in so many of those that are taken


class Capacity(Protocol):
    """What the order asks of whatever requests compete for."""

    def fit(self, request: Request) -> Fit:
        """Whether the waiting request can start now."""
        ...

    def num_expected_hits(self, request: Request) -> int:
        """Tokens of the request that it would probably not have to compute."""
        ...


class KvCapacity:
    """Seats and KV blocks, within each tenant's ceiling and guarantee. Owner of the seats and the blocks.

    Attributes:
        blocks: the KV blocks.
        num_running: requests with a seat.
        num_configured_tenants: how many the policies name, whether or not they have come yet.
    """

    def __init__(self, settings: SchedulerSettings, tenants: Mapping[str, Tenant]) -> None:
        """`tenants`: all live tenants by id, as they are at any time."""
        self.blocks = BlockManager(
            settings.num_kv_blocks, settings.block_size, enable_prefix_caching=settings.enable_prefix_caching
        )
        self._settings = settings
        self._tenants = tenants
        self.num_configured_tenants = 0
        is_fair = settings.scheduling_policy is SchedulingPolicy.FAIR
        self._num_reserved_seats = settings.max_num_seqs // _SEATS_PER_RESERVED if is_fair else 0
        self._free_seats = list(range(settings.max_num_seqs - 1, -1, -1))
        self._left_seats: list[int] = []  # since somebody last asked

    # -- seats

    @property
    def num_running(self) -> int:
        return self._settings.max_num_seqs - len(self._free_seats)

    @property
    def num_missing_seats(self) -> int:
        """Seats that must be cleared before one more request can run; negative: seats to spare."""
        return 1 - len(self._free_seats)

    def num_missing_seats_for(self, tenant: Tenant) -> int:
        """The same of one more request of this tenant: one that has many leaves those that are reserved."""
        return self.num_missing_seats + (0 if self.has_few_seats(tenant) else self._num_reserved_seats)

    def has_few_seats(self, tenant: Tenant) -> bool:
        """Whether the tenant may take the last seats: it has few, or there is nobody else to leave them to."""
        return tenant.num_running * _MANY <= self.num_running or self._is_only_tenant

    @property
    def _is_only_tenant(self) -> bool:
        return len(self._tenants) <= 1 and self.num_configured_tenants <= 1

    def take_seat(self) -> int:
        return self._free_seats.pop()

    def leave_seat(self, seat: int) -> None:
        self._free_seats.append(seat)
        self._left_seats.append(seat)

    def take_freed_seats(self) -> list[int]:
        """Seats that were left since the last call; some may be taken again."""
        left, self._left_seats = self._left_seats, []
        return left

    # -- fit

    def fit(self, request: Request) -> Fit:
        """Whether the waiting request finds a seat and blocks for all its tokens and one more."""
        blocks, tenant = self.blocks, self._tenants[request.tenant_id]
        if blocks.num_blocks_for(request.num_tokens + 1) > min(blocks.num_blocks, tenant.max_blocks):
            return Fit.NEVER
        if self._has_ceiling(tenant):
            num_held = blocks.num_held_blocks(tenant.tenant_id)
            if num_held + blocks.num_missing_blocks(request) > tenant.max_blocks:
                return Fit.CAPPED
        if request.num_in_flight_tokens or blocks.is_next_block_expected(request):
            return Fit.UNSETTLED
        if self.num_missing_seats > 0 or self.num_missing_blocks(request) > 0:
            return Fit.STARVED
        return Fit.RESERVED if self.num_missing_seats_for(tenant) > 0 else Fit.FITS

    def num_expected_hits(self, request: Request) -> int:
        """Tokens of the request's prefix that are likely to be cached."""
        return self.blocks.num_expected_hits(request)

    def num_missing_blocks(self, request: Request) -> int:
        """Blocks that must be cleared before the request may start; negative: blocks to spare."""
        num_missing = self.blocks.num_missing_blocks(request) - self.blocks.num_free_blocks
        return num_missing + self.num_growth_blocks(request, self.num_running)

    def num_growth_blocks(self, request: Request, num_running: int) -> int:
        """Blocks that a request beyond its tenant's guarantee leaves free when it starts: room for `num_running` to
        grow until one of them finishes. Else each admission is paid for with a preemption."""
        if request.tenant_id in self.blocks.guarantees and self.is_within_guarantee(request):
            return 0
        return int(num_running * self._settings.growth_blocks)

    # -- guarantees and ceilings

    def is_within_guarantee(self, request: Request) -> bool:
        """Whether its tenant, with this request too, would hold no more blocks than it is guaranteed."""
        num_beyond = self.num_beyond_guarantee(self._tenants[request.tenant_id])
        return num_beyond + self.blocks.num_missing_blocks(request) <= 0

    def num_beyond_guarantee(self, tenant: Tenant) -> int:
        """Blocks that the tenant holds beyond its guarantee; negative: what it may still claim."""
        return self.blocks.num_held_blocks(tenant.tenant_id) - self.blocks.guarantees.get(tenant.tenant_id, 0)

    def is_at_ceiling(self, tenant: Tenant) -> bool:
        """Whether the tenant holds all the blocks that it may; one that may hold the whole cache has no ceiling."""
        return self._has_ceiling(tenant) and self.blocks.num_held_blocks(tenant.tenant_id) >= tenant.max_blocks

    def _has_ceiling(self, tenant: Tenant) -> bool:
        return tenant.max_blocks < self.blocks.num_blocks

    # -- growth

    def with_room(self, requests: Iterable[Request]) -> list[Request]:
        """Those that run, on blocks with room for their next token."""
        size = self._settings.block_size
        return [r for r in requests if len(r.block_table) * size > r.num_computed_tokens]

    def without_room(self, requests: Iterable[Request]) -> list[Request]:
        """The others."""
        size = self._settings.block_size
        return [r for r in requests if len(r.block_table) * size <= r.num_computed_tokens]

    def num_spare_blocks(self, request: Request) -> int:
        """Blocks that a running request may take before it must: within its tenant's ceiling, and beyond what all that
        run will need to grow."""
        spare = self.blocks.num_free_blocks - int(self.num_running * self._settings.growth_blocks)
        tenant = self._tenants[request.tenant_id]
        if self._has_ceiling(tenant):
            spare = min(spare, tenant.max_blocks - self.blocks.num_held_blocks(tenant.tenant_id))
        return max(0, spare)

    def check_integrity(self, running: list[Request]) -> None:
        """Assert that the blocks' and seats' books are right for those that run. For tests and idle moments."""
        self.blocks.check_integrity()
        seats = sorted((*self._free_seats, *(request.seat for request in running)))
        assert seats == list(range(self._settings.max_num_seqs))
