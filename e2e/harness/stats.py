"""What an engine's core tells, for tests of what is made of it."""

from typing import Any

from msgspec import structs

from evenhand_engine.messages import TenantStats

_OF_ONE = TenantStats(
    tenant_id="t",
    num_running=1,
    num_waiting=0,
    num_kv_blocks=2,
    service=10,
    virtual_service=0.0,
    ahead=0.0,
    lag=0.0,
    lag_bound=0.0,
    num_preemptions=0,
    num_prompt_tokens=0,
    num_generation_tokens=0,
)


def make_tenant_stats(tenant_id: str, **changed: Any) -> TenantStats:
    """Of a tenant of which one request runs."""
    return structs.replace(_OF_ONE, tenant_id=tenant_id, **changed)
