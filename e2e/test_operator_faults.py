"""What the operator promises when things break: docs/reliability.md names the tests of this file.

They share two replicas and two engines; each brings the others' state where it needs it, and has policies of its own.
"""

import base64
import json
import os
import signal
import time

import pytest

from cluster.control_plane import ControlPlane
from evenhand_policy.bootstrap import mounted_keys, unpack
from evenhand_policy.push_document import open_document
from harness.fixtures import OPERATOR, OPERATOR_NAMESPACE, Operators
from harness.objects import Object, policy, pool
from harness.operator_process import OperatorProcess
from harness.stage import Stage, conditions, until, until_still


def enforce(stage: Stage, name: str, **spec: object) -> None:
    """Apply a policy, and return when it is in force."""
    stage.apply(name, **spec)
    stage.wait_ready(name)


def lease(stage: Stage) -> Object:
    return stage.cluster.get("lease", OPERATOR, OPERATOR_NAMESPACE)


def epoch(stage: Stage) -> int:
    """As the operator has stored it."""
    return int(lease(stage)["metadata"]["annotations"]["evenhand.dev/epoch"])


def epochs(stage: Stage) -> set[int]:
    """As the pods enforce it."""
    return {document["epoch"] for document in stage.documents()}


@pytest.fixture(scope="module")
def replicas(operators: Operators, stage: Stage) -> list[OperatorProcess]:
    """The first leads."""
    started = [operators.start(stage.namespace, name=name) for name in ("first", "second")]
    stage.wait_serving(2)
    return started


def bootstrap_files(stage: Stage) -> dict[str, bytes]:
    """What a pod would find mounted."""
    secrets = [
        stage.cluster.get("secret", f"evenhand-bootstrap-default-{end}", stage.namespace) for end in ("manifest", "0")
    ]
    return {name: base64.b64decode(content) for each in secrets for name, content in each["data"].items()}


def by_role(replicas: list[OperatorProcess]) -> tuple[OperatorProcess, OperatorProcess]:
    """The leader and the other, once one of them leads."""
    until(lambda: sorted(each.metric("evenhand_operator_is_leader") for each in replicas) == [0, 1])
    leader, other = sorted(replicas, key=lambda each: -each.metric("evenhand_operator_is_leader"))
    return leader, other


# ---- replicas


def test_only_the_leader_writes_and_both_are_ready(stage: Stage, replicas: list[OperatorProcess]) -> None:
    enforce(stage, "written-by-the-leader")
    leader, other = by_role(replicas)
    assert leader.metric("evenhand_operator_api_writes_total") > 0
    assert other.metric("evenhand_operator_api_writes_total") == 0
    assert (leader.probe("readyz"), other.probe("readyz")) == (200, 200)


def test_killed_leader_is_replaced_and_nothing_is_lost(stage: Stage, replicas: list[OperatorProcess]) -> None:
    leader, other = by_role(replicas)
    enforce(stage, "steady")
    before, version = epoch(stage), stage.policy("steady")["metadata"]["resourceVersion"]
    weights = {f"flood-{weight}": weight for weight in range(1, 21)}
    flood = [policy(stage.namespace, name, weight=weight) for name, weight in weights.items()]
    stage.cluster.apply(*flood[:10])
    leader.kill()  # in the middle of it
    stage.cluster.apply(*flood[10:])
    until(lambda: epoch(stage) > before)
    stage.wait_ready(*weights)
    for tenants in stage.tenants():
        assert {name: tenants[name]["weight"] for name in weights} == weights
    until(lambda: epochs(stage) == {epoch(stage)})
    assert stage.policy("steady")["metadata"]["resourceVersion"] == version, "what has not changed is not written"
    leader.start()
    assert by_role(replicas)[0] is other
    stage.kubectl("delete", "tpol", *weights)


def test_leader_that_is_told_to_stop_hands_over_at_once(stage: Stage, replicas: list[OperatorProcess]) -> None:
    leader, other = by_role(replicas)
    identity = lease(stage)["spec"]["holderIdentity"]
    leader.stop()
    assert lease(stage)["spec"].get("holderIdentity") != identity, "nobody has to wait until it runs out"
    until(lambda: other.metric("evenhand_operator_is_leader") == 1)
    enforce(stage, "handed-over", weight=3)
    leader.start()


def test_operator_that_is_told_to_stop_has_stored_what_is_in_force(
    stage: Stage, replicas: list[OperatorProcess]
) -> None:
    leader, other = by_role(replicas)
    other.stop()
    for weight in (11, 12, 13):  # each is later than the last Secret that was written without being told to stop
        enforce(stage, "stored", weight=weight)
    leader.stop()
    manifest, compressed = unpack(bootstrap_files(stage), mounted_keys(bootstrap_files(stage)))
    stored = open_document(compressed, manifest.digest)
    assert {tenant.tenant_id: tenant.weight for tenant in stored.tenants}["stored"] == 13
    enforced = [(document["epoch"], document["revision"]) for document in stage.documents()]
    assert enforced == [(manifest.epoch, manifest.revision)] * 2
    for replica in replicas:
        replica.start()


def test_policies_that_are_deleted_while_the_operator_starts_are_dropped(
    stage: Stage, replicas: list[OperatorProcess]
) -> None:
    """Between the operator's own list and the first one of its watch."""
    leader, other = by_role(replicas)
    other.stop()
    for start in range(3):
        names = [f"start-{start}-{index}" for index in range(8)]
        stage.cluster.apply(*(policy(stage.namespace, name) for name in names))
        stage.wait_ready(*names)
        leader.stop()
        leader.start()
        for name in names:
            stage.kubectl("delete", "tpol", name)
        until(lambda names=names: [stage.enforced(name, "weight") for name in names] == [[None, None]] * 8)
    other.start()


def test_leader_that_slept_does_no_harm_when_it_wakes(stage: Stage, replicas: list[OperatorProcess]) -> None:
    leader, other = by_role(replicas)
    os.kill(leader.program.pid, signal.SIGSTOP)
    try:
        until(lambda: other.metric("evenhand_operator_is_leader") == 1)
        enforce(stage, "slept-through", weight=4)
        current = epoch(stage)
    finally:
        os.kill(leader.program.pid, signal.SIGCONT)
    until(lambda: leader.metric("evenhand_operator_is_leader") == 0)
    enforce(stage, "slept-through", weight=5)
    assert stage.enforced("slept-through", "weight") == [5, 5]
    assert current <= epoch(stage)
    until(lambda: epochs(stage) == {epoch(stage)})


def test_deleted_lease_rolls_nothing_back(stage: Stage, replicas: list[OperatorProcess]) -> None:
    before = epoch(stage)
    stage.cluster.kubectl("delete", "lease", OPERATOR, "-n", OPERATOR_NAMESPACE)
    until(lambda: lease(stage)["spec"]["holderIdentity"])
    enforce(stage, "without-a-lease")
    assert epoch(stage) >= before
    until(lambda: epochs(stage) == {epoch(stage)})


def test_engines_that_know_a_newer_epoch_are_overtaken_not_obeyed(
    stage: Stage, replicas: list[OperatorProcess], operators: Operators
) -> None:
    """A restored etcd: what is stored is older than what pods enforce."""
    enforce(stage, "restored", weight=6)
    for replica in replicas:
        replica.stop()
    before = max(epochs(stage))
    stored = lease(stage)
    stored["metadata"]["annotations"]["evenhand.dev/epoch"] = "1"
    stage.cluster.apply({key: stored[key] for key in ("apiVersion", "kind", "metadata", "spec")})
    forget_epoch = json.dumps({"status": {"epoch": 1, "revision": 1, "pods": []}})
    stage.kubectl("patch", "epool", "default", "--subresource=status", "--type=merge", "-p", forget_epoch)
    secrets = ["evenhand-bootstrap-default-0", "evenhand-bootstrap-default-manifest"]
    stage.kubectl("delete", "secret", *secrets, "--ignore-not-found")
    for replica in replicas:
        replica.start()
    stage.apply("restored", weight=7)
    until(lambda: stage.enforced("restored", "weight") == [7, 7])
    assert min(epochs(stage)) > before
    stage.wait_ready("restored")
    until(lambda: stage.pool()["status"]["epoch"] == epoch(stage))


# ---- the API server


def test_deletions_and_changes_while_the_api_server_was_away(stage: Stage, replicas: list[OperatorProcess]) -> None:
    names = [f"gap-{index}" for index in range(6)]
    stage.cluster.apply(*(policy(stage.namespace, name) for name in names))
    stage.wait_ready(*names)
    for replica in replicas:  # they see nothing of what happens now
        os.kill(replica.program.pid, signal.SIGSTOP)
    try:
        stage.kubectl("delete", "tpol", *names[:3])
        stage.apply(names[3], weight=8)
        stage.apply("born-in-the-gap")
        stage.cluster.restart_api_server(grace=0)
    finally:
        for replica in replicas:
            os.kill(replica.program.pid, signal.SIGCONT)
    stage.wait_ready(names[3], "born-in-the-gap")
    expected = [[None] * 2] * 3 + [[8] * 2, [1] * 2, [1] * 2]
    until(lambda: [stage.enforced(name, "weight") for name in names] == expected)
    assert stage.enforced("born-in-the-gap", "weight") == [1, 1]
    stage.kubectl("delete", "tpol", *names[3:], "born-in-the-gap")


def test_engines_enforce_what_they_have_while_the_api_server_is_away(
    stage: Stage, replicas: list[OperatorProcess]
) -> None:
    enforce(stage, "outlasting", weight=7)
    before = stage.enforced("outlasting", "weight")
    pods = stage.ready_pods()
    stage.cluster.stop_api_server(grace=0)
    try:
        time.sleep(9)  # longer than a leader may go without renewing the Lease
        for replica in replicas:
            replica.program.check_running()
            assert replica.probe("healthz") == 200
        assert len(pods) == 2
    finally:
        stage.cluster.start_api_server()
    enforce(stage, "outlasting", weight=9)
    assert (before, stage.enforced("outlasting", "weight")) == ([7, 7], [9, 9])


def test_watch_that_is_cut_again_and_again_misses_nothing(stage: Stage, replicas: list[OperatorProcess]) -> None:
    for weight in (10, 11):
        stage.cluster.restart_api_server(grace=0)
        stage.apply("cut", weight=weight)
        until(lambda weight=weight: stage.enforced("cut", "weight") == [weight] * 2)
    stage.wait_ready("cut")


# ---- other versions


def test_what_another_version_has_written_is_tolerated(
    stage: Stage, cluster: ControlPlane, replicas: list[OperatorProcess]
) -> None:
    """Conditions and members that this version does not know neither stop it nor make it write for ever."""
    enforce(stage, "billed")
    for replica in replicas:
        replica.stop()
    row = {
        "type": "Billed",
        "status": "True",
        "reason": "Billed",
        "message": "",
        "lastTransitionTime": "2030-01-01T00:00:00Z",
    }
    foreign = {"conditions": [row]}
    for kind, name in (("TenantPolicy", "billed"), ("EnginePool", "default")):
        metadata = {"name": name, "namespace": stage.namespace}
        obj = {"apiVersion": "evenhand.dev/v1alpha1", "kind": kind, "metadata": metadata, "status": foreign}
        arguments = ["apply", "--server-side", "--subresource=status", "--field-manager=evenhand-billing", "-f", "-"]
        cluster.kubectl(*arguments, stdin=json.dumps(obj))
    later = json.dumps({"metadata": {"annotations": {"evenhand.dev/epoch": "1000", "evenhand.dev/shard": "3"}}})
    cluster.kubectl("patch", "lease", OPERATOR, "-n", OPERATOR_NAMESPACE, "--type=merge", "-p", later)
    for replica in replicas:
        replica.start()
    enforce(stage, "billed", weight=2)
    until(lambda: epochs(stage) == {epoch(stage)})
    assert epoch(stage) > 1000
    assert lease(stage)["metadata"]["annotations"]["evenhand.dev/shard"] == "3"
    assert conditions(stage.policy("billed"))["Billed"] == conditions(stage.pool())["Billed"] == ("True", "Billed")
    enforce(stage, "other")
    leader, _ = by_role(replicas)
    until_still(lambda: leader.metric("evenhand_operator_api_writes_total", resource="tenantpolicies/status"), 5)


def test_pool_that_goes_and_comes_back_goes_on(stage: Stage, replicas: list[OperatorProcess]) -> None:
    enforce(stage, "orphan", weight=2)
    stage.kubectl("delete", "epool", "default")
    stage.wait("Accepted=false", "orphan")
    assert stage.conditions("orphan")["Accepted"] == ("False", "PoolNotFound")
    assert stage.enforced("orphan", "weight") == [2, 2], "engines keep what they have"
    stage.cluster.apply(pool(stage.namespace))
    stage.wait_ready("orphan")
    enforce(stage, "orphan", weight=3)
    assert stage.enforced("orphan", "weight") == [3, 3]
