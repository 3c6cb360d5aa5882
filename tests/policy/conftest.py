"""Objects as users write them: the smallest valid one of each kind, with what a test adds."""

from collections.abc import Callable
from typing import Any

import pytest

Object = dict[str, Any]

KEY_A = "a-key-that-nobody-can-guess-0001"
KEY_B = "a-key-that-nobody-can-guess-0002"


@pytest.fixture(scope="session")
def policy() -> Callable[..., Object]:
    def build(name: str = "chatbot", *, namespace: str = "inference", age: int = 0, **spec: Any) -> Object:
        metadata: Object = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "generation": 1}
        if age:
            metadata["creationTimestamp"] = f"2026-01-01T00:00:{60 - age:02}Z"
        return {"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy", "metadata": metadata, "spec": spec}

    return build


@pytest.fixture(scope="session")
def pool() -> Callable[..., Object]:
    def build(name: str = "default", *, namespace: str = "inference", **spec: Any) -> Object:
        spec.setdefault("selector", {"matchLabels": {"app": "evenhand-engine"}})
        metadata = {"name": name, "namespace": namespace}
        return {"apiVersion": "evenhand.dev/v1alpha1", "kind": "EnginePool", "metadata": metadata, "spec": spec}

    return build


@pytest.fixture(scope="session")
def secret() -> Callable[..., Object]:
    def build(name: str, *, namespace: str = "inference", **string_data: str) -> Object:
        metadata = {"name": name, "namespace": namespace}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": string_data}

    return build


@pytest.fixture
def guest(policy: Callable[..., Object]) -> Callable[..., Object]:
    def build(name: str = "web", *, namespace: str = "guest", **spec: Any) -> Object:
        return policy(name, namespace=namespace, **{"poolRef": {"namespace": "inference"}} | spec)

    return build


@pytest.fixture
def admitting(pool: Callable[..., Object]) -> Callable[..., Object]:
    """A pool that admits every namespace, with these grants."""

    def build(*grants: Object, **spec: Any) -> Object:
        return pool(**{"allowedNamespaces": {"from": "All"}, "grants": list(grants)} | spec)

    return build
