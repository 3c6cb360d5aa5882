"""The life of policies under a running operator: real API server, the rights of the manifests, the engines' own admin code."""

import base64
import json
import os
import signal
from collections.abc import Iterator

import jwt
import pytest

from cluster.control_plane import ControlPlane
from cluster.pod_runner import PodRunner
from evenhand_policy.bootstrap import MANIFEST_FILE, mounted_keys, read_manifest
from evenhand_policy.credentials import key_hash
from harness.fixtures import OPERATOR_NAMESPACE, Operators
from harness.objects import (
    Object,
    api_key,
    light_engines,
    policy,
    pool,
    secret,
    service_account,
)
from harness.operator_process import OperatorProcess
from harness.stage import Stage, conditions, until

KEY, OTHER_KEY = "a-key-that-nobody-can-guess-0001", "a-key-that-nobody-can-guess-0002"


@pytest.fixture(scope="module")
def pods(cluster: ControlPlane, served_namespace: str) -> Iterator[PodRunner]:
    with PodRunner(cluster, served_namespace) as runner:
        yield runner


@pytest.fixture(scope="module")
def operator(operators: Operators, served_namespace: str, other_namespace: str) -> OperatorProcess:
    return operators.start(served_namespace, other_namespace)


@pytest.fixture(scope="module")
def stage(cluster: ControlPlane, served_namespace: str, pods: PodRunner, operator: OperatorProcess) -> Stage:
    """Two engines, their pool, and a policy that each test finds as it is."""
    stage = Stage(cluster, served_namespace)
    cluster.apply(
        pool(served_namespace),
        light_engines(served_namespace, 2),
        secret(served_namespace, "resident-keys", one=KEY),
        policy(served_namespace, "resident", identities=[api_key("resident-keys")], kvCache={"guaranteedPercent": 30}),
    )
    until(lambda: [row["state"] for row in stage.rows().values()] == ["Applied"] * 2)
    stage.wait_ready("resident")
    return stage


def apply(stage: Stage, name: str, **spec: object) -> None:
    stage.cluster.apply(policy(stage.namespace, name, **spec))


def kstatus(stage: Stage, obj: Object) -> str:
    return str(stage.cluster.kstatus([obj])[0]["status"])


# ---- a policy's life


def test_policy_is_in_force_in_every_pod_when_it_is_ready(stage: Stage) -> None:
    apply(stage, "chat", weight=4, latencyClass="Interactive", limits={"requestsPerMinute": 60})
    stage.wait_ready("chat")
    assert stage.enforced("chat", "weight") == [4, 4]
    assert stage.enforced("chat", "limits") == [{"requestsPerMinute": 60} | unlimited(stage)] * 2
    assert stage.conditions("chat") == {
        "Accepted": ("True", "Accepted"),
        "Programmed": ("True", "Programmed"),
        "Ready": ("True", "Ready"),
        "Stalled": ("False", "NotStalled"),
    }
    assert kstatus(stage, stage.policy("chat")) == "Current"

    apply(stage, "chat", weight=9)
    stage.wait_ready("chat")
    assert stage.enforced("chat", "weight") == [9, 9]
    edited = stage.policy("chat")
    assert edited["status"]["observedGeneration"] == edited["metadata"]["generation"] == 2
    assert edited["status"]["programmedRevision"] <= stage.pool()["status"]["revision"]

    stage.kubectl("delete", "tpol", "chat")
    until(lambda: stage.enforced("chat", "weight") == [None, None])
    until(lambda: stage.pool()["status"]["tenants"] == 1)


def unlimited(stage: Stage) -> Object:
    """All limits of a tenant that has none, but for what a test sets."""
    return {key: value for key, value in stage.enforced("resident", "limits")[0].items() if key != "requestsPerMinute"}


def test_suspended_policy_is_suspended_in_every_pod(stage: Stage) -> None:
    apply(stage, "resting", suspend=True)
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


def test_change_writes_the_status_of_what_has_changed_and_of_the_pool(stage: Stage, operator: OperatorProcess) -> None:
    for index in range(5):
        apply(stage, f"many-{index}")
    stage.wait_ready(*(f"many-{index}" for index in range(5)))
    until(lambda: stage.pool()["status"]["applied"] == "2/2")
    versions = {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in policies(stage)}
    before = operator.metric("evenhand_operator_api_writes_total", resource="tenantpolicies/status")
    apply(stage, "many-3", weight=7)
    stage.wait_ready("many-3")
    after = operator.metric("evenhand_operator_api_writes_total", resource="tenantpolicies/status")
    assert after - before == 1
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
    apply(stage, name, **spec)
    stage.wait("Accepted=false", name)
    refused = stage.policy(name)
    found = conditions(refused)
    assert found["Accepted"] == found["Ready"] == ("False", reason)
    assert found["Programmed"] == ("False", "NotAccepted")
    assert message in next(each["message"] for each in refused["status"]["conditions"] if each["type"] == "Accepted")
    assert kstatus(stage, refused) == flux
    assert KEY not in str(refused), "no key is shown"
    until(lambda: stage.events(name) == [("Warning", reason)])
    assert stage.enforced("resident", "weight") == [1, 1]

    if reason != "Conflicted":  # the tenant is immutable: that one is cured in a test below
        stage.kubectl("patch", "tpol", name, "--type=merge", "-p", json.dumps({"spec": CURE}))
        stage.wait_ready(name)
        assert stage.enforced(name, "weight") == [1, 1]
        until(lambda: stage.events(name) == [("Warning", reason), ("Normal", "Accepted")])
    stage.kubectl("delete", "tpol", name)


CURE = {"identities": [], "poolRef": {"name": "default"}, "kvCache": None}


def test_policy_of_a_namespace_that_the_pool_does_not_admit(stage: Stage, other_namespace: str) -> None:
    guest = policy(other_namespace, "guest", poolRef={"name": "default", "namespace": stage.namespace})
    stage.cluster.apply(guest)
    other = Stage(stage.cluster, other_namespace)
    other.wait("Accepted=false", "guest")
    assert other.conditions("guest")["Accepted"] == ("False", "NotAllowed")
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
    other.wait("Stalled=true", "gold-chat", "resident")
    assert other.conditions("gold-chat")["Accepted"] == ("False", "ExceedsGrant")
    stage.kubectl("patch", "epool", "default", "--type=merge", "-p", grants)
    other.wait_ready("gold-chat")
    assert stage.enforced("gold-chat", "weight") == [10, 10]
    [accepted] = [each for each in other.policy("resident")["status"]["conditions"] if each["type"] == "Accepted"]
    assert accepted["reason"] == "ExceedsGrant"
    assert "metadata.name: tenant resident does not begin with the tenantPrefix gold-" in accepted["message"]
    assert stage.enforced("resident", "suspended") == [False, False], "the victim is served"
    other.kubectl("delete", "tpol", "gold-chat", "resident")
    restore = '{"spec": {"allowedNamespaces": {"from": "Same"}, "grants": null}}'
    stage.kubectl("patch", "epool", "default", "--type=merge", "-p", restore)


def test_policy_gets_in_when_the_older_one_leaves(stage: Stage) -> None:
    apply(stage, "elder", tenant="seat")
    stage.wait_ready("elder")
    apply(stage, "younger", tenant="seat", weight=3)
    stage.wait("Accepted=false", "younger")
    stage.kubectl("delete", "tpol", "elder")
    stage.wait_ready("younger")
    assert stage.enforced("seat", "weight") == [3, 3]
    stage.kubectl("delete", "tpol", "younger")


# ---- identities


def test_added_key_works_and_removed_one_stops(stage: Stage) -> None:
    stage.cluster.apply(secret(stage.namespace, "rotating", one=OTHER_KEY))
    apply(stage, "rotating", identities=[api_key("rotating")])
    stage.wait_ready("rotating")
    assert stage.enforced("rotating", "keyHashes") == [[key_hash(OTHER_KEY)]] * 2
    before = stage.policy("rotating")["metadata"]["resourceVersion"]

    third = "a-key-that-nobody-can-guess-0003"
    stage.cluster.apply(secret(stage.namespace, "rotating", one=OTHER_KEY, two=third))
    until(lambda: stage.enforced("rotating", "keyHashes") == [sorted(map(key_hash, (OTHER_KEY, third)))] * 2)
    stage.cluster.apply(secret(stage.namespace, "rotating", two=third))
    until(lambda: stage.enforced("rotating", "keyHashes") == [[key_hash(third)]] * 2)
    assert stage.policy("rotating")["metadata"]["resourceVersion"] == before

    stage.kubectl("delete", "secret", "rotating")
    stage.wait("Accepted=false", "rotating")
    assert stage.enforced("rotating", "keyHashes") == [None, None]
    stage.kubectl("delete", "tpol", "rotating")


def test_engines_can_verify_the_tokens_of_service_accounts(stage: Stage) -> None:
    apply(stage, "workload", identities=[service_account("default")])
    stage.wait_ready("workload")
    user = f"system:serviceaccount:{stage.namespace}:default"
    assert stage.enforced("workload", "serviceAccounts") == [[user]] * 2
    issuer = stage.documents()[0]["config"]["serviceAccounts"]
    token = stage.cluster.service_account_token(stage.namespace, "default", audience=issuer["audience"])
    keys = jwt.PyJWKSet.from_dict(issuer["jwks"])
    key = keys[jwt.get_unverified_header(token)["kid"]]
    claims = jwt.decode(token, key, algorithms=["RS256"], audience=issuer["audience"], issuer=issuer["issuer"])
    assert claims["sub"] == user
    stage.kubectl("delete", "tpol", "workload")


# ---- pods


def test_operator_makes_its_key_and_tells_pods_the_public_half(stage: Stage) -> None:
    """Nobody has to create a Secret; what pods are given cannot sign."""
    secret = stage.cluster.get("secret", "evenhand-signing-key", OPERATOR_NAMESPACE)
    assert (secret["type"], sorted(secret["data"])) == (
        "evenhand.dev/signing-key",
        ["current.pem", "next.pem", "previous.json"],
    )
    data = stage.cluster.get("secret", "evenhand-bootstrap-default-manifest", stage.namespace)["data"]
    keys = json.loads(base64.b64decode(data["operator-keys.json"]))["keys"]
    assert [sorted(key) for key in keys] == [["crv", "kty", "x"]] * 2


def test_key_that_was_lost_is_made_anew_and_pods_learn_it(stage: Stage, operator: OperatorProcess) -> None:
    """The way out when it may be known to others: delete the Secret and restart the operator."""
    stage.cluster.kubectl("delete", "secret", "evenhand-signing-key", "-n", OPERATOR_NAMESPACE)
    operator.stop()
    operator.start()
    apply(stage, "rotation", weight=2)
    until(lambda: stage.enforced("rotation", "weight") == [2, 2])
    stage.wait_ready("rotation")
    stage.kubectl("delete", "tpol", "rotation")


def test_pod_that_starts_after_the_key_was_lost_begins_with_what_is_stored(
    stage: Stage, pods: PodRunner, operator: OperatorProcess
) -> None:
    """Also while no other pod answers: what is stored is signed by the new key as soon as that is mounted."""
    until(lambda: stored_revision(stage) == stage.pool()["status"]["revision"])
    before, others = bootstrap_keys(stage), sorted(stage.rows())
    operator.stop()
    stage.cluster.kubectl("delete", "secret", "evenhand-signing-key", "-n", OPERATOR_NAMESPACE)
    for name in others:
        os.kill(pods.program(name).pid, signal.SIGSTOP)
    try:
        operator.start()
        until(lambda: bootstrap_keys(stage) != before)
        stage.kubectl("scale", "deployment", "engines", "--replicas=3")
        until(lambda: len(stage.ready_pods()) == 3, timeout=10)
        [new] = [pod for pod in stage.ready_pods() if pod["metadata"]["name"] not in others]
        assert "cannot be used" not in pods.program(new["metadata"]["name"]).log.read_text()
        until(lambda: stage.rows()[new["metadata"]["name"]]["state"] == "Applied", timeout=10)
    finally:
        for name in others:
            os.kill(pods.program(name).pid, signal.SIGCONT)
    until(lambda: stage.pool()["status"]["applied"] == "3/3")
    stage.kubectl("scale", "deployment", "engines", "--replicas=2")
    until(lambda: stage.pool()["status"]["applied"] == "2/2")


def bootstrap_files(stage: Stage) -> dict[str, bytes]:
    data = stage.cluster.get("secret", "evenhand-bootstrap-default-manifest", stage.namespace)["data"]
    return {name: base64.b64decode(content) for name, content in data.items()}


def bootstrap_keys(stage: Stage) -> bytes:
    return bootstrap_files(stage)["operator-keys.json"]


def stored_revision(stage: Stage) -> int | None:
    """None while there is only whom to believe."""
    files = bootstrap_files(stage)
    return read_manifest(files, mounted_keys(files)).revision if MANIFEST_FILE in files else None


def test_pod_that_cannot_prove_itself_is_told_nothing(stage: Stage, pods: PodRunner) -> None:
    """What is mounted is all that it gets; the pool says so, with the reason."""
    stage.cluster.apply(light_engines(stage.namespace, 1, "--pod-token=/nowhere", name="unproven"))
    try:
        until(lambda: len(stage.rows()) == 3)
        [row] = [row for name, row in stage.rows().items() if name.startswith("unproven")]
        assert (row["state"], "no token" in row["message"]) == ("Rejected", True)
        assert "revision" not in row, "it was told something"
    finally:
        stage.kubectl("delete", "deployment", "unproven")
    until(lambda: len(stage.rows()) == 2)


def test_restarted_pod_keeps_its_config_and_is_pushed_to(stage: Stage, pods: PodRunner) -> None:
    [name, _] = sorted(stage.rows())
    before = stage.rows()[name]["bootId"]
    os.kill(pods.program(name).pid, signal.SIGKILL)
    until(lambda: stage.rows()[name]["bootId"] != before and stage.rows()[name]["state"] == "Applied")
    assert stage.enforced("resident", "weight") == [1, 1]
    assert "BuiltIn" not in {each["source"] for each in stage.documents()}, "it began with what was stored"


def test_new_pod_starts_with_the_stored_document_and_shares_the_limits(stage: Stage) -> None:
    apply(stage, "steady")
    stage.wait_ready("steady")
    before = stage.policy("steady")["metadata"]["resourceVersion"]
    stage.kubectl("scale", "deployment", "engines", "--replicas=3")
    until(lambda: stage.pool()["status"]["applied"] == "3/3")
    assert [each["numReplicas"] for each in stage.documents()] == [3, 3, 3]
    assert stage.enforced("steady", "weight") == [1, 1, 1]
    stage.kubectl("scale", "deployment", "engines", "--replicas=2")
    until(lambda: stage.pool()["status"]["applied"] == "2/2")
    until(lambda: [each["numReplicas"] for each in stage.documents()] == [2, 2])
    assert stage.policy("steady")["metadata"]["resourceVersion"] == before, "a new pod makes no policy flap"
    stage.kubectl("delete", "tpol", "steady")


def test_pod_that_cannot_be_reached_is_shown_and_holds_up_nobody(stage: Stage, pods: PodRunner) -> None:
    apply(stage, "before")
    stage.wait_ready("before")
    [lost, other] = sorted(stage.rows())
    os.kill(pods.program(lost).pid, signal.SIGSTOP)
    try:
        apply(stage, "after", weight=6)
        until(lambda: stage.conditions("after")["Programmed"] == ("False", "PartiallyProgrammed"))
        assert stage.rows()[lost]["state"] == "Unreachable"
        assert stage.rows()[lost]["message"] == "no complete answer in time"
        assert stage.rows()[other]["state"] == "Applied"
        assert stage.pool()["status"]["applied"] == "1/2"
        assert kstatus(stage, stage.policy("after")) == kstatus(stage, stage.pool()) == "InProgress"
        assert stage.conditions("before")["Programmed"] == ("True", "Programmed"), "the lost pod enforces it still"
    finally:
        os.kill(pods.program(lost).pid, signal.SIGCONT)
    stage.wait_ready("after")
    assert stage.enforced("after", "weight") == [6, 6]
    stage.kubectl("delete", "tpol", "before", "after")


# ---- the operator itself


def test_metrics_and_probes_tell_its_state(stage: Stage, operator: OperatorProcess) -> None:
    assert (operator.probe("healthz"), operator.probe("readyz")) == (200, 200)
    num_policies = len(policies(stage))
    assert operator.metric("evenhand_operator_policies", condition="Ready", status="True") == num_policies
    assert operator.metric("evenhand_operator_pods", state="Applied") == 2
    assert operator.metric("evenhand_operator_is_leader") == 1
    assert operator.metric("evenhand_operator_push_seconds_count") > 0
    assert operator.metric("evenhand_operator_reconcile_seconds_count") > 0
    assert operator.metric("evenhand_operator_push_errors_total", reason="timeout") > 0


def test_it_asked_for_nothing_that_the_manifests_do_not_allow(stage: Stage, operator: OperatorProcess) -> None:
    assert "forbidden" not in operator.log.read_text().lower()


def test_no_secret_is_in_its_log(stage: Stage, operator: OperatorProcess) -> None:
    log = operator.log.read_text()
    assert not [each for each in (KEY, OTHER_KEY, "PRIVATE KEY", key_hash(KEY)) if each in log]
