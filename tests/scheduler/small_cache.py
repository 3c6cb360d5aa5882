"""A cache of few blocks, in which tenants are in each other's way."""

from evenhand_engine.config import SchedulerSettings
from evenhand_policy.config import KvCacheShare, TenantConfig

from .conftest import PretendEngine


def small(**changes: object) -> SchedulerSettings:
    """A cache of 64 blocks of 4 tokens; everything else generous."""
    defaults: dict[str, object] = {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 64,
        "num_kv_blocks": 64,
        "block_size": 4,
        "preemption_lag": 64,
        "min_run_seconds": 5.0,
    }
    return SchedulerSettings(**(defaults | changes))  # type: ignore[arg-type]


def tenant(tenant_id: str, *, guaranteed: int = 0, most: int = 100, weight: int = 1) -> TenantConfig:
    share = KvCacheShare(guaranteed_percent=guaranteed, max_percent=most)
    return TenantConfig(tenant_id=tenant_id, kv_cache=share, weight=weight)


def held(engine: PretendEngine, tenant_id: str) -> int:
    return engine.scheduler.request_table.blocks.num_held_blocks(tenant_id)
