"""What engines are told by a running operator: identities, its keys, what is stored, and pods that come, go and fall silent."""

import base64
import json
import os
import signal

import jwt
import pytest

from cluster.pod_runner import PodRunner
from evenhand_policy.bootstrap import MANIFEST_FILE, mounted_keys, read_manifest
from evenhand_policy.credentials import key_hash
from harness.fixtures import OPERATOR_NAMESPACE
from harness.objects import (
    Object,
    api_key,
    light_engines,
    secret,
    service_account,
)
from harness.operator_process import OperatorProcess
from harness.resident import KEY, OTHER_KEY
from harness.stage import Stage, until

pytestmark = pytest.mark.usefixtures("resident_operator")


# ---- identities


def test_added_key_works_and_removed_one_stops(stage: Stage) -> None:
    stage.cluster.apply(secret(stage.namespace, "rotating", one=OTHER_KEY))
    stage.apply("rotating", identities=[api_key("rotating")])
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
    stage.wait_refused("rotating", "SecretNotFound")
    stage.wait_enforced("rotating", "keyHashes", [None, None])
    stage.kubectl("delete", "tpol", "rotating")


def test_engines_can_verify_the_tokens_of_service_accounts(stage: Stage) -> None:
    stage.apply("workload", identities=[service_account("default")])
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


def test_key_that_was_lost_is_made_anew_and_pods_learn_it(stage: Stage, resident_operator: OperatorProcess) -> None:
    """The way out when it may be known to others: delete the Secret and restart the operator."""
    stage.cluster.kubectl("delete", "secret", "evenhand-signing-key", "-n", OPERATOR_NAMESPACE)
    resident_operator.stop()
    resident_operator.start()
    stage.apply("rotation", weight=2)
    until(lambda: stage.enforced("rotation", "weight") == [2, 2])
    stage.wait_ready("rotation")
    stage.kubectl("delete", "tpol", "rotation")


def test_pod_that_starts_after_the_key_was_lost_begins_with_what_is_stored(
    stage: Stage, pods: PodRunner, resident_operator: OperatorProcess
) -> None:
    """Also while no other pod answers: what is stored is signed by the new key as soon as that is mounted."""
    until(lambda: stored_revision(stage) == stage.pool()["status"]["revision"])
    before, others = bootstrap_keys(stage), sorted(stage.rows())
    resident_operator.stop()
    stage.cluster.kubectl("delete", "secret", "evenhand-signing-key", "-n", OPERATOR_NAMESPACE)
    for name in others:
        os.kill(pods.program(name).pid, signal.SIGSTOP)
    try:
        resident_operator.start()
        until(lambda: bootstrap_keys(stage) != before)
        stage.kubectl("scale", "deployment", "engines", "--replicas=3")
        until(lambda: len(stage.ready_pods()) == 3)
        [new] = [pod for pod in stage.ready_pods() if pod["metadata"]["name"] not in others]
        assert "cannot be used" not in pods.program(new["metadata"]["name"]).log.read_text()
        until(lambda: stage.rows()[new["metadata"]["name"]]["state"] == "Applied")
    finally:
        for name in others:
            os.kill(pods.program(name).pid, signal.SIGCONT)
    stage.wait_serving(3)
    stage.kubectl("scale", "deployment", "engines", "--replicas=2")
    stage.wait_serving(2)


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
        until(lambda: unproven(stage)["state"] == "Rejected")
        assert "no token" in unproven(stage)["message"]
        assert "revision" not in unproven(stage), "it was told something"
    finally:
        stage.kubectl("delete", "deployment", "unproven")
    until(lambda: len(stage.rows()) == 2)


def unproven(stage: Stage) -> Object:
    """What the pool's status says of that pod. Raises StopIteration while it says nothing."""
    return next(row for name, row in stage.rows().items() if name.startswith("unproven"))


def test_restarted_pod_keeps_its_config_and_is_pushed_to(stage: Stage, pods: PodRunner) -> None:
    [name, _] = sorted(stage.rows())
    before = stage.rows()[name]["bootId"]
    os.kill(pods.program(name).pid, signal.SIGKILL)
    until(lambda: stage.rows()[name]["bootId"] != before and stage.rows()[name]["state"] == "Applied")
    stage.wait_enforced("resident", "weight", [1, 1])
    assert "BuiltIn" not in {each["source"] for each in stage.documents()}, "it began with what was stored"


def test_new_pod_starts_with_the_stored_document_and_shares_the_limits(stage: Stage) -> None:
    stage.apply("steady")
    stage.wait_ready("steady")
    before = stage.policy("steady")["metadata"]["resourceVersion"]
    stage.kubectl("scale", "deployment", "engines", "--replicas=3")
    stage.wait_serving(3)
    until(lambda: [each["numReplicas"] for each in stage.documents()] == [3, 3, 3])
    assert stage.enforced("steady", "weight") == [1, 1, 1]
    stage.kubectl("scale", "deployment", "engines", "--replicas=2")
    stage.wait_serving(2)
    until(lambda: [each["numReplicas"] for each in stage.documents()] == [2, 2])
    assert stage.policy("steady")["metadata"]["resourceVersion"] == before, "a new pod makes no policy flap"
    stage.kubectl("delete", "tpol", "steady")


def test_pod_that_cannot_be_reached_is_shown_and_holds_up_nobody(
    stage: Stage, pods: PodRunner, resident_operator: OperatorProcess
) -> None:
    stage.apply("before")
    stage.wait_ready("before")
    [lost, other] = sorted(stage.rows())
    os.kill(pods.program(lost).pid, signal.SIGSTOP)
    try:
        stage.apply("after", weight=6)
        until(lambda: stage.conditions("after")["Programmed"] == ("False", "PartiallyProgrammed"))
        until(lambda: stage.pool()["status"]["applied"] == "1/2")
        until(lambda: [stage.rows()[each]["state"] for each in (lost, other)] == ["Unreachable", "Applied"])
        assert stage.rows()[lost]["message"] == "no complete answer in time"
        assert resident_operator.metric("evenhand_operator_push_errors_total", reason="timeout") > 0
        assert stage.kstatus(stage.policy("after")) == stage.kstatus(stage.pool()) == "InProgress"
        assert stage.conditions("before")["Programmed"] == ("True", "Programmed"), "the lost pod enforces it still"
    finally:
        os.kill(pods.program(lost).pid, signal.SIGCONT)
    stage.wait_ready("after")
    assert stage.enforced("after", "weight") == [6, 6]
    stage.kubectl("delete", "tpol", "before", "after")


# ---- the operator itself


def test_metrics_and_probes_tell_its_state(stage: Stage, resident_operator: OperatorProcess) -> None:
    assert (resident_operator.probe("healthz"), resident_operator.probe("readyz")) == (200, 200)
    num_policies = len(stage.cluster.find("tenantpolicies.evenhand.dev", stage.namespace))
    ready = {"condition": "Ready", "status": "True"}
    until(lambda: resident_operator.metric("evenhand_operator_policies", **ready) == num_policies)
    until(lambda: resident_operator.metric("evenhand_operator_pods", state="Applied") == 2)
    assert resident_operator.metric("evenhand_operator_is_leader") == 1
    assert resident_operator.metric("evenhand_operator_push_seconds_count") > 0
    assert resident_operator.metric("evenhand_operator_reconcile_seconds_count") > 0


def test_it_asked_for_nothing_that_the_manifests_do_not_allow(stage: Stage, resident_operator: OperatorProcess) -> None:
    assert "forbidden" not in resident_operator.log.read_text().lower()


def test_no_secret_is_in_its_log(stage: Stage, resident_operator: OperatorProcess) -> None:
    log = resident_operator.log.read_text()
    assert not [each for each in (KEY, OTHER_KEY, "PRIVATE KEY", key_hash(KEY)) if each in log]
