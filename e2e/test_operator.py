"""The life of policies under a running operator: real API server, the rights of the manifests, the engines' own admin code."""

import json

import pytest

from harness.objects import (
    Object,
    api_key,
    policy,
    secret,
)
from harness.operator_process import OperatorProcess
from harness.resident import KEY
from harness.stage import Stage, conditions, until

pytestmark = pytest.mark.usefixtures("resident_operator")


# ---- a policy's life


def test_policy_is_in_force_in_every_pod_when_it_is_ready(stage: Stage) -> None:
    stage.apply("chat", weight=4, latencyClass="Interactive", limits={"requestsPerMinute": 60})
    stage.wait_ready("chat")
    assert stage.enforced("chat", "weight") == [4, 4]
    assert stage.enforced("chat", "limits") == [{"requestsPerMinute": 60} | unlimited(stage)] * 2
    assert stage.conditions("chat") == {
        "Accepted": ("True", "Accepted"),
        "Programmed": ("True", "Programmed"),
        "Ready": ("True", "Ready"),
        "Stalled": ("False", "NotStalled"),
    }
    assert stage.kstatus(stage.policy("chat")) == "Current"

    stage.apply("chat", weight=9)
    stage.wait_ready("chat")
    assert stage.enforced("chat", "weight") == [9, 9]
    edited = stage.policy("chat")
    assert edited["status"]["observedGeneration"] == edited["metadata"]["generation"] == 2
    until(lambda: edited["status"]["programmedRevision"] <= stage.pool()["status"]["revision"])

    stage.kubectl("delete", "tpol", "chat")
    until(lambda: stage.enforced("chat", "weight") == [None, None])
    until(lambda: stage.pool()["status"]["tenants"] == 1)


def unlimited(stage: Stage) -> Object:
    """All limits of a tenant that has none, but for what a test sets."""
    return {key: value for key, value in stage.enforced("resident", "limits")[0].items() if key != "requestsPerMinute"}


def test_suspended_policy_is_suspended_in_every_pod(stage: Stage) -> None:
    stage.apply("resting", suspend=True)
    stage.wait_ready("resting")
    assert stage.enforced("resting", "suspended") == [True, True]


def test_operator_writes_nothing_but_status(stage: Stage) -> None:
    resident = stage.cluster.kubectl(
        "get", "tpol", "resident", "-n", stage.namespace, "-o", "yaml", "--show-managed-fields"
    )
    assert "finalizers" not in resident
    assert "kopf" not in resident
    managers = stage.kubectl("get", "tpol", "resident", "-o", "jsonpath={.metadata.managedFields[*].manager}").split()
    owned = stage.kubectl(
        "get",
        "tpol",
        "resident",
        "-o",
        'jsonpath={.metadata.managedFields[?(@.manager=="evenhand-operator")].subresource}',
    )
    assert sorted(managers) == ["evenhand-operator", "kubectl-client-side-apply"]
    assert owned == "status"


def test_change_writes_the_status_of_what_has_changed_and_of_the_pool(
    stage: Stage, resident_operator: OperatorProcess
) -> None:
    """In one write where pods answer in time, and one more for each thing that there is to say before they do."""
    for index in range(5):
        stage.apply(f"many-{index}")
    stage.wait_ready(*(f"many-{index}" for index in range(5)))
    until(lambda: stage.pool()["status"]["applied"] == "2/2")
    versions = {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in policies(stage)}
    before = resident_operator.metric("evenhand_operator_api_writes_total", resource="tenantpolicies/status")
    stage.apply("many-3", weight=7)
    stage.wait_ready("many-3")
    after = resident_operator.metric("evenhand_operator_api_writes_total", resource="tenantpolicies/status")
    assert 1 <= after - before < len(versions)
    changed = [each for each in policies(stage) if each["metadata"]["resourceVersion"] != versions[name_of(each)]]
    assert list(map(name_of, changed)) == ["many-3"]


def policies(stage: Stage) -> list[Object]:
    return stage.cluster.find("tenantpolicies.evenhand.dev", stage.namespace)


def name_of(obj: Object) -> str:
    return str(obj["metadata"]["name"])


# ---- what is refused

REFUSED: dict[str, tuple[Object, str, str]] = {
    "Conflicted": ({"tenant": "resident"}, "Failed", "tenant resident is already claimed by TenantPolicy"),
    "IdentityConflicted": ({"identities": [api_key("same-keys")]}, "Failed", "the key under one of Secret same-keys"),
    "GuaranteeOvercommitted": ({"kvCache": {"guaranteedPercent": 71}}, "Failed", "spec.kvCache.guaranteedPercent"),
    "PoolNotFound": ({"poolRef": {"name": "missing"}}, "InProgress", "there is no EnginePool"),
    "SecretNotFound": ({"identities": [api_key("missing")]}, "InProgress", "spec.identities[0].apiKey.secretRef.name"),
    "WeakKey": ({"identities": [api_key("weak-keys")]}, "Failed", "fewer than 24 characters"),
    "Invalid": ({"identities": [api_key("unsendable-keys")]}, "Failed", "cannot be sent in a header"),
}


@pytest.fixture(scope="module")
def bad_secrets(stage: Stage) -> None:
    stage.cluster.apply(
        secret(stage.namespace, "same-keys", one=KEY),
        secret(stage.namespace, "weak-keys", one="guessable"),
        secret(stage.namespace, "unsendable-keys", one="a key with spaces in it, and ümlauts"),
    )


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_policy_says_why_and_what_to_do(stage: Stage, bad_secrets: None, reason: str) -> None:
    spec, flux, message = REFUSED[reason]
    name = f"refused-{reason.lower()}"
    stage.apply(name, **spec)
    stage.wait_refused(name, reason)
    refused = stage.policy(name)
    found = conditions(refused)
    assert found["Accepted"] == found["Ready"] == ("False", reason)
    assert found["Programmed"] == ("False", "NotAccepted")
    assert message in accepted(refused)["message"]
    assert stage.kstatus(refused) == flux
    assert KEY not in str(refused), "no key is shown"
    until(lambda: told(stage, name, reason) == [("Warning", reason)])
    assert stage.enforced("resident", "weight") == [1, 1]

    if reason != "Conflicted":  # the tenant is immutable: that one is cured in a test below
        stage.kubectl("patch", "tpol", name, "--type=merge", "-p", json.dumps({"spec": CURE}))
        stage.wait_ready(name)
        assert stage.enforced(name, "weight") == [1, 1]
        until(lambda: told(stage, name, reason) == [("Warning", reason), ("Normal", "Accepted")])
    stage.kubectl("delete", "tpol", name)


def told(stage: Stage, name: str, reason: str) -> list[tuple[str, str]]:
    """Events of a refusal and its end; there may be others, of a pod that was slow."""
    return [event for event in stage.events(name) if event[1] in (reason, "Accepted")]


CURE = {"identities": [], "poolRef": {"name": "default"}, "kvCache": None}


def test_policy_of_a_namespace_that_the_pool_does_not_admit(stage: Stage, other_namespace: str) -> None:
    guest = policy(other_namespace, "guest", poolRef={"name": "default", "namespace": stage.namespace})
    stage.cluster.apply(guest)
    other = Stage(stage.cluster, other_namespace)
    other.wait_refused("guest", "NotAllowed")
    stage.kubectl("patch", "epool", "default", "--type=merge", "-p", '{"spec": {"allowedNamespaces": {"from": "All"}}}')
    other.wait_ready("guest")
    assert stage.enforced(f"{other_namespace}/guest", "weight") == [1, 1]
    other.kubectl("delete", "tpol", "guest")


def test_guest_has_what_the_pool_grants_its_namespace(stage: Stage, other_namespace: str) -> None:
    grants = json.dumps(
        {
            "spec": {
                "allowedNamespaces": {"from": "All"},
                "grants": [
                    {
                        "namespaces": {"matchLabels": {"kubernetes.io/metadata.name": other_namespace}},
                        "maxWeight": 10,
                        "latencyClasses": ["Interactive"],
                        "tenantPrefix": "gold-",
                    }
                ],
            }
        }
    )
    other = Stage(stage.cluster, other_namespace)
    reference = {"name": "default", "namespace": stage.namespace}
    claimed = {"poolRef": reference, "weight": 10, "latencyClass": "Interactive", "suspend": True}
    stage.kubectl("patch", "epool", "default", "--type=merge", "-p", '{"spec": {"allowedNamespaces": {"from": "All"}}}')
    other.cluster.apply(policy(other_namespace, "gold-chat", **claimed), policy(other_namespace, "resident", **claimed))
    for name in ("gold-chat", "resident"):
        other.wait_refused(name, "ExceedsGrant")
    stage.kubectl("patch", "epool", "default", "--type=merge", "-p", grants)
    other.wait_ready("gold-chat")
    assert stage.enforced("gold-chat", "weight") == [10, 10]
    why = "metadata.name: tenant resident does not begin with the tenantPrefix gold-"
    until(lambda: why in accepted(other.policy("resident"))["message"])
    assert accepted(other.policy("resident"))["reason"] == "ExceedsGrant"
    assert stage.enforced("resident", "suspended") == [False, False], "the victim is served"
    other.kubectl("delete", "tpol", "gold-chat", "resident")
    restore = '{"spec": {"allowedNamespaces": {"from": "Same"}, "grants": null}}'
    stage.kubectl("patch", "epool", "default", "--type=merge", "-p", restore)


def accepted(obj: Object) -> Object:
    """The condition."""
    return next(each for each in obj["status"]["conditions"] if each["type"] == "Accepted")


def test_policy_gets_in_when_the_older_one_leaves(stage: Stage) -> None:
    stage.apply("elder", tenant="seat")
    stage.wait_ready("elder")
    stage.apply("younger", tenant="seat", weight=3)
    stage.wait("Accepted=false", "younger")
    stage.kubectl("delete", "tpol", "elder")
    stage.wait_ready("younger")
    assert stage.enforced("seat", "weight") == [3, 3]
    stage.kubectl("delete", "tpol", "younger")
