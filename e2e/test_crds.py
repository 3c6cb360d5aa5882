"""Life of a TenantPolicy and an EnginePool on a real API server, before any operator looks at them."""

import json
from typing import Any

import pytest

from cluster import build
from cluster.client import KubectlError, Object
from cluster.control_plane import ControlPlane
from evenhand_policy.decode import decode
from evenhand_policy.spec import TenantPolicy
from harness.stage import until


def resource(kind: str, namespace: str, name: str, spec: Any) -> Object:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "evenhand.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


@pytest.fixture
def policy(cluster: ControlPlane, crds: None, namespace: str) -> Object:
    policy = resource("TenantPolicy", namespace, "chatbot", {"tenant": "web", "weight": 4})
    cluster.apply(policy)
    return policy


@pytest.mark.parametrize("tenant", ["other", None])
def test_the_tenant_can_be_neither_changed_nor_removed(
    cluster: ControlPlane, policy: Object, tenant: str | None
) -> None:
    patch = json.dumps({"spec": {"tenant": tenant}})
    with pytest.raises(KubectlError, match="tenant is immutable"):
        cluster.kubectl("patch", "tpol", "chatbot", "-n", policy["metadata"]["namespace"], "--type=merge", "-p", patch)


def test_a_tenant_cannot_be_added_later(cluster: ControlPlane, crds: None, namespace: str) -> None:
    policy = resource("TenantPolicy", namespace, "chatbot", {"weight": 1})
    cluster.apply(policy)
    policy["spec"]["tenant"] = "chatbot"
    with pytest.raises(KubectlError, match="tenant is immutable"):
        cluster.apply(policy)
    del policy["spec"]["tenant"]
    policy["spec"]["weight"] = 2
    cluster.apply(policy)


def test_defaults_are_written_out(cluster: ControlPlane, policy: Object) -> None:
    stored = cluster.get("tenantpolicy", "chatbot", policy["metadata"]["namespace"])
    assert stored["spec"] == {
        "poolRef": {"name": "default"},
        "tenant": "web",
        "weight": 4,
        "latencyClass": "Standard",
        "fairness": "FIFO",
        "enforcement": "Enforce",
        "suspend": False,
    }


def test_nobody_takes_a_policy_for_ready_before_the_operator_has_seen_it(cluster: ControlPlane, policy: Object) -> None:
    namespace = policy["metadata"]["namespace"]
    stored = cluster.get("tenantpolicy", "chatbot", namespace)
    conditions = {each["type"]: (each["status"], each["reason"]) for each in stored["status"]["conditions"]}
    assert conditions == dict.fromkeys(["Accepted", "Programmed", "Ready"], ("Unknown", "Pending"))
    assert [each["status"] for each in cluster.kstatus([stored])] == ["InProgress"]
    with pytest.raises(KubectlError, match="timed out waiting"):
        cluster.kubectl("wait", "--for=condition=Ready", "tpol/chatbot", "-n", namespace, "--timeout=1s")


def test_a_condition_that_is_applied_leaves_the_others(cluster: ControlPlane, policy: Object) -> None:
    condition = {
        "type": "Accepted",
        "status": "True",
        "reason": "Accepted",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
        "observedGeneration": 1,
    }
    status = {key: policy[key] for key in ("apiVersion", "kind", "metadata")} | {"status": {"conditions": [condition]}}
    cluster.kubectl(
        *("apply", "--server-side", "--subresource=status", "--field-manager=test", "-f", "-"), stdin=json.dumps(status)
    )
    stored = cluster.get("tenantpolicy", "chatbot", policy["metadata"]["namespace"])
    conditions = {each["type"]: each["status"] for each in stored["status"]["conditions"]}
    assert conditions == {"Accepted": "True", "Programmed": "Unknown", "Ready": "Unknown"}
    assert stored["metadata"]["generation"] == 1
    assert decode(stored, TenantPolicy).spec.weight == 4


def test_kubectl_get_shows_the_columns_people_need(cluster: ControlPlane, policy: Object) -> None:
    namespace = policy["metadata"]["namespace"]
    header, row = cluster.kubectl("get", "evenhand", "-n", namespace).splitlines()
    assert header.split() == ["NAME", "TENANT", "POOL", "WEIGHT", "CLASS", "PROGRAMMED", "READY", "AGE"]
    assert row.split()[:7] == [
        "tenantpolicy.evenhand.dev/chatbot",
        "web",
        "default",
        "4",
        "Standard",
        "Unknown",
        "Unknown",
    ]
    selected = cluster.kubectl("get", "tpol", "-n", namespace, "--field-selector=spec.poolRef.name=gold", "-o", "name")
    assert selected == ""


def test_the_tenant_that_is_shown_is_the_policys_name_where_it_names_none(
    cluster: ControlPlane, crds: None, namespace: str
) -> None:
    cluster.apply(resource("TenantPolicy", namespace, "unnamed", {}))
    cluster.apply(resource("TenantPolicy", namespace, "named", {"tenant": "web"}))
    rows = cluster.kubectl("get", "tpol", "-n", namespace, "--no-headers").splitlines()
    assert [row.split()[:2] for row in rows] == [["named", "web"], ["unnamed", "unnamed"]]


def test_kubectl_get_shows_how_far_a_pool_is(cluster: ControlPlane, crds: None, namespace: str) -> None:
    pool = resource("EnginePool", namespace, "gold", {"selector": {"matchLabels": {"app": "engine"}}})
    cluster.apply(pool)
    pod = {"name": "engine-0", "state": "Applied", "epoch": 1, "revision": 41, "since": "2026-01-01T00:00:00Z"}
    status = {
        "epoch": 1,
        "revision": 41,
        "tenants": 7,
        "desiredPods": 3,
        "appliedPods": 2,
        "applied": "2/3",
        "pods": [pod],
    }
    patch = json.dumps({"status": status})
    cluster.kubectl("patch", "epool", "gold", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    header, row = cluster.kubectl("get", "epool", "-n", namespace).splitlines()
    assert header.split() == ["NAME", "REVISION", "APPLIED", "TENANTS", "AGE"]
    assert row.split()[:4] == ["gold", "41", "2/3", "7"]
    assert cluster.get("epool", "gold", namespace)["spec"]["serviceAccountTokens"] == {"maxAge": "24h"}


def test_kubectl_explain_tells_what_a_field_means(cluster: ControlPlane, crds: None) -> None:
    """Soon after the kind is known: the API server publishes schemas in the background."""

    def text() -> str:
        return " ".join(cluster.kubectl("explain", "tenantpolicy.spec.latencyClass").split())

    until(lambda: "ENUM: Interactive Standard Batch" in text())
    assert "never how much over time" in text()


def test_the_examples_are_accepted_to_the_last_field(cluster: ControlPlane, crds: None) -> None:
    for name in ("inference", "chat"):
        cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    for example in sorted((build.SOURCES.parents[1] / "manifests/examples").iterdir()):
        cluster.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", str(example))
