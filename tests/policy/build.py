"""Compiles policies, and tells what became of them."""

import hashlib
from collections.abc import Callable
from typing import Any

from evenhand_policy.compile import Compilation, compile_policies
from evenhand_policy.decode import decode
from evenhand_policy.pool import EnginePool
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy

Build = Callable[..., dict[str, Any]]


def sha256(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def compiled(policies: list[Any], pool: Any = None, secrets: list[Any] | None = None, **labels: Any) -> Compilation:
    held = [decode(item, Secret) for item in secrets or []]
    return compile_policies(
        [decode(item, TenantPolicy) for item in policies],
        decode(pool, EnginePool) if pool else None,
        {(item.metadata.namespace, item.metadata.name): item for item in held},
        **labels,
    )


def refusals(compilation: Compilation) -> list[tuple[str, str, str]]:
    return [(problem.resource.name, problem.reason.value, problem.path) for problem in compilation.problems]


def tenant_ids(compilation: Compilation) -> list[str]:
    return [tenant.tenant_id for tenant in compilation.config.tenants]


def api_key(name: str, secret: str) -> dict[str, Any]:
    return {"name": name, "type": "APIKey", "apiKey": {"secretRef": {"name": secret}}}


def header(value: str) -> dict[str, Any]:
    return {"name": "gw", "type": "Header", "header": {"value": value}}


def service_account(name: str, namespace: str | None = None, uid: str | None = None) -> dict[str, Any]:
    account = {"name": name} | ({"namespace": namespace} if namespace else {}) | ({"uid": uid} if uid else {})
    return {"name": "web", "type": "ServiceAccount", "serviceAccount": account}
