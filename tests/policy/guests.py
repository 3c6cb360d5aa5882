"""A pool's guests: policies of other namespaces, and what became of them."""

from typing import Any

from evenhand_policy.compile import Compilation, compile_policies
from evenhand_policy.decode import decode
from evenhand_policy.pool import EnginePool
from evenhand_policy.spec import TenantPolicy

LABELS = {"guest": {"team": "gold"}, "other": {"team": "tin"}}
EVERY = {"namespaces": {}}
ACCOUNT = {"name": "web", "type": "ServiceAccount", "serviceAccount": {"name": "web"}}
NAMESPACE = {"name": "all", "type": "ServiceAccountNamespace", "serviceAccountNamespace": {}}


def compiled(policies: list[Any], pool: Any, labels: Any = LABELS) -> Compilation:
    decoded = [decode(each, TenantPolicy) for each in policies]
    return compile_policies(decoded, decode(pool, EnginePool), {}, namespace_labels=labels)


def tenants(result: Compilation) -> dict[str, int]:
    return {tenant.tenant_id: tenant.weight for tenant in result.config.tenants}
