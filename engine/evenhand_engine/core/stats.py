"""Snapshots of the scheduler for metrics and people."""

from collections import deque
from typing import Protocol

from evenhand_engine.messages import EngineStats, TenantStats
from evenhand_engine.scheduler.fair_share import VIRTUAL_UNIT
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.request_table import RequestTable
from evenhand_engine.scheduler.speculation import Speculation
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_policy.config import SchedulerConfig

_INTERVAL_SECONDS = 0.1
_MAX_STEPS = 4096  # that are told of, should nobody ask for so long


class Observed(Protocol):
    """Whose state is told: the engine's scheduler, or a sidecar's dispatcher."""

    request_table: RequestTable
    ledger: Ledger
    config: SchedulerConfig
    step_id: int

    @property
    def num_preemptions(self) -> int: ...


class StatsRecorder:
    """Collects each step's size and duration, and says every 100 ms what changed since."""

    def __init__(self, scheduler: Observed, speculation: Speculation | None = None) -> None:
        """`speculation`: whose drafts are counted; None: there are none."""
        self._scheduler = scheduler
        self._speculation = speculation
        self._steps: deque[tuple[int, float]] = deque(maxlen=_MAX_STEPS)
        self._due = 0.0
        self._reported: dict[str, TenantStats] = {}
        self._config: SchedulerConfig | None = None
        self._digest = ""

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """Note one finished step."""
        self._steps.append((num_tokens, seconds))

    def snapshot(self, now: float, *, is_idle: bool) -> EngineStats | None:
        """The state at `now`; None if the last one is recent and the engine is not about to fall idle."""
        if now < self._due and not is_idle:
            return None
        self._due = now + _INTERVAL_SECONDS
        scheduler, request_table, speculation = self._scheduler, self._scheduler.request_table, self._speculation
        if self._config is not scheduler.config:
            self._config, self._digest = scheduler.config, scheduler.config.digest()
        ledger = scheduler.ledger
        highest = max((ledger.service(tenant) for tenant in request_table.tenants.values()), default=0)
        competing = (*request_table.active.values(), *request_table.running_tenants.values())
        bound = ledger.lag_bound(tenant.weight for tenant in competing)
        tenants = {i: self._tenant_stats(tenant, highest, bound) for i, tenant in request_table.tenants.items()}
        changed = tuple(stats for tenant_id, stats in tenants.items() if self._reported.get(tenant_id) != stats)
        retired = tuple(tenant_id for tenant_id in self._reported if tenant_id not in tenants)
        self._reported = tenants
        steps, self._steps = self._steps, deque(maxlen=_MAX_STEPS)
        return EngineStats(
            time=now,
            step_id=scheduler.step_id,
            num_running=request_table.num_running,
            num_waiting=request_table.num_waiting,
            num_deferred=sum(tenant.num_deferred for tenant in request_table.tenants.values()),
            num_kv_blocks=request_table.blocks.num_blocks,
            num_free_kv_blocks=request_table.blocks.num_free_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=request_table.blocks.num_prefix_queries,
            num_prefix_hits=request_table.blocks.num_prefix_hits,
            num_drafts=speculation.num_drafts if speculation else 0,
            num_draft_tokens=speculation.num_draft_tokens if speculation else 0,
            num_accepted_tokens=speculation.num_accepted_tokens if speculation else 0,
            virtual_time=scheduler.ledger.shares.virtual_time / VIRTUAL_UNIT,
            config_digest=self._digest,
            step_tokens=tuple(num_tokens for num_tokens, _ in steps),
            step_seconds=tuple(seconds for _, seconds in steps),
            tenants=changed,
            retired_tenants=retired,
        )

    def _tenant_stats(self, tenant: Tenant, highest: int, bound: int) -> TenantStats:
        """`highest`: virtual service of the tenant furthest ahead; `bound`: how far behind it one may be."""
        shares = self._scheduler.ledger.shares
        virtual_service = shares.virtual_service(tenant.tenant_id)
        waits = tenant.has_prompts and tenant.may_start
        return TenantStats(
            tenant_id=tenant.tenant_id,
            num_running=tenant.num_running,
            num_waiting=len(tenant.waiting),
            num_kv_blocks=self._scheduler.request_table.blocks.num_held_blocks(tenant.tenant_id),
            service=tenant.service,
            virtual_service=virtual_service / VIRTUAL_UNIT,
            ahead=(virtual_service - shares.virtual_time) / VIRTUAL_UNIT,
            lag=(highest - virtual_service) / VIRTUAL_UNIT if waits else 0.0,
            lag_bound=bound / VIRTUAL_UNIT,
            num_preemptions=tenant.num_preemptions,
            num_prompt_tokens=tenant.num_prompt_tokens,
            num_generation_tokens=tenant.num_generation_tokens,
        )
