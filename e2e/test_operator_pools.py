"""Pools and namespaces of an operator that serves several: who has which pods, who may come in, and what is left of one that goes."""

import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.control_plane import ControlPlane
from cluster.ports import free_ports
from harness.fixtures import Operators, new_served_namespace
from harness.objects import ENGINE_LABELS, Object, policy, pool
from harness.operator_process import ANSWER_SECONDS, OperatorProcess
from harness.stage import Stage, conditions, until

UNTAGGED = {"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}


@pytest.fixture(scope="module")
def doomed(cluster: ControlPlane, operator_kubeconfig: Path) -> Iterator[str]:
    """A namespace that a test deletes."""
    yield from new_served_namespace(cluster)


@pytest.fixture(scope="module")
def operator(operators: Operators, stage: Stage, other_namespace: str, doomed: str) -> OperatorProcess:
    operator = operators.start(stage.namespace, other_namespace, doomed)
    stage.wait_serving(2)
    return operator


@pytest.fixture
def guest(stage: Stage, other_namespace: str) -> Iterator[Stage]:
    guest = Stage(stage.cluster, other_namespace)
    yield guest
    guest.kubectl("delete", "tpol", "--all")
    change_pool(stage)


def change_pool(stage: Stage, **spec: object) -> None:
    stage.cluster.apply(pool(stage.namespace, **spec))


def guest_policy(stage: Stage, guest: Stage, name: str, **spec: object) -> Object:
    return policy(guest.namespace, name, poolRef={"name": "default", "namespace": stage.namespace}, **spec)


def message(obj: Object, kind: str) -> str:
    return next(str(each["message"]) for each in obj["status"]["conditions"] if each["type"] == kind)


def test_pool_without_a_ready_pod_is_not_ready(stage: Stage, operator: OperatorProcess) -> None:
    stage.cluster.apply(pool(stage.namespace, "empty", selector={"matchLabels": {"app": "nothing"}}))
    until(lambda: conditions(stage.pool("empty"))["Ready"] == ("False", "NoPods"))
    stage.cluster.apply(policy(stage.namespace, "early", poolRef={"name": "empty"}))
    stage.wait_ready("early")
    assert stage.conditions("early")["Programmed"] == ("True", "NoPods")
    assert stage.cluster.kstatus([stage.pool("empty")])[0]["status"] == "InProgress"
    stage.kubectl("delete", "tpol", "early")
    stage.kubectl("delete", "epool", "empty")


def test_pool_that_selects_the_pods_of_another_is_told_so_and_tells_them_nothing(
    stage: Stage, operator: OperatorProcess
) -> None:
    before = [document["config"]["pool"]["name"] for document in stage.documents()]
    stage.cluster.apply(pool(stage.namespace, "twin"), policy(stage.namespace, "of-the-twin", poolRef={"name": "twin"}))
    try:
        until(lambda: conditions(stage.pool("twin"))["Accepted"] == ("False", "Overlapping"))
        assert "(of default)" in message(stage.pool("twin"), "Accepted")
        until(lambda: conditions(stage.pool())["Ready"] == ("True", "Ready"))
        assert [document["config"]["pool"]["name"] for document in stage.documents()] == before == ["default"] * 2
        assert stage.enforced("of-the-twin", "weight") == [None, None]
        stage.cluster.apply(pool(stage.namespace, "twin", selector={"matchLabels": ENGINE_LABELS | {"tier": "twin"}}))
        until(lambda: conditions(stage.pool("twin"))["Accepted"] == ("True", "Accepted"))
    finally:
        stage.kubectl("delete", "tpol", "of-the-twin")
        stage.kubectl("delete", "epool", "twin")


def test_namespace_of_unknown_labels_matches_no_selector(stage: Stage, guest: Stage, operator: OperatorProcess) -> None:
    """An operator of single namespaces does not see their labels: not even DoesNotExist lets anybody in."""
    change_pool(stage, allowedNamespaces={"from": "Selector", "selector": UNTAGGED})
    stage.cluster.apply(guest_policy(stage, guest, "web"))
    guest.wait_refused("web", "NamespaceUnknown")
    assert stage.enforced(f"{guest.namespace}/web", "weight") == [None, None]
    change_pool(stage, allowedNamespaces={"from": "All"}, grants=[{"namespaces": UNTAGGED, "maxWeight": 1000}])
    until(lambda: "grant" in message(guest.policy("web"), "Accepted"))
    assert guest.conditions("web")["Accepted"][0] == "False"
    by_name = {"matchLabels": {"kubernetes.io/metadata.name": guest.namespace}}
    change_pool(stage, allowedNamespaces={"from": "Selector", "selector": by_name})
    guest.wait_ready("web")


def test_accounts_of_a_namespace_and_defaults_of_a_pool(stage: Stage, guest: Stage, operator: OperatorProcess) -> None:
    change_pool(
        stage,
        allowedNamespaces={"from": "All"},
        grants=[{"namespaces": {}, "identityTypes": ["ServiceAccountNamespace"]}],
        defaults={"limits": {"requestsPerMinute": 60, "maxOutputTokens": 100}},
        serviceAccountTokens={"maxAge": "1h"},
    )
    whole = [{"name": "all", "type": "ServiceAccountNamespace", "serviceAccountNamespace": {}}]
    stage.cluster.apply(guest_policy(stage, guest, "team", identities=whole, limits={"maxOutputTokens": 5}))
    guest.wait_ready("team")
    for document in stage.documents():
        [team] = [each for each in document["config"]["tenants"] if each["tenantId"] == f"{guest.namespace}/team"]
        assert team["serviceAccounts"] == [f"system:serviceaccounts:{guest.namespace}"]
        assert (team["limits"]["requestsPerMinute"], team["limits"]["maxOutputTokens"]) == (60, 5)
        issuer = document["config"]["serviceAccounts"]
        assert (issuer["audience"], issuer["maxAgeSeconds"]) == (f"evenhand/{stage.namespace}/default", 3600)


def test_next_leader_sends_documents_to_nobody_who_has_them(stage: Stage, operator: OperatorProcess) -> None:
    stage.cluster.apply(policy(stage.namespace, "steady"))
    stage.wait_ready("steady")
    before = stage.pool()["status"]
    operator.stop()
    operator.start()
    until(lambda: stage.pool()["status"]["epoch"] > before["epoch"])
    stage.wait_serving(2)
    assert min(document["epoch"] for document in stage.documents()) > before["epoch"]
    assert operator.metric("evenhand_operator_documents_sent_total") == 0
    stage.kubectl("delete", "tpol", "steady")


def test_metrics_port_is_reached_by_either_family(operators: Operators, stage: Stage, tmp_path: Path) -> None:
    """`::`, the default, is all addresses of both, so that probes reach a pod of an IPv6-only cluster."""
    [port] = free_ports(1)
    replica = operators.start(stage.namespace, name="both", wait=False, options=("--host=::", f"--metrics-port={port}"))
    addresses = ["127.0.0.1"]
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):  # not everywhere
        addresses.append("[::1]")

    def answers(address: str) -> bool:
        with urllib.request.urlopen(f"http://{address}:{port}/healthz", timeout=ANSWER_SECONDS) as response:
            return bool(response.status == 200)

    try:
        for address in addresses:
            until(lambda address=address: answers(address))
    finally:
        replica.stop()


def test_deleted_namespace_stops_no_other(stage: Stage, operator: OperatorProcess, doomed: str) -> None:
    """Its RoleBinding goes before its objects do; the operator may be restarted after that."""
    cluster = stage.cluster
    reference = {"name": "default", "namespace": stage.namespace}
    change_pool(stage, allowedNamespaces={"from": "All"})
    cluster.apply(policy(doomed, "last", poolRef=reference), policy(stage.namespace, "resident"))
    Stage(cluster, doomed).wait_ready("last")
    cluster.kubectl("delete", "namespace", doomed, timeout=240)
    until(lambda: stage.enforced(f"{doomed}/last", "weight") == [None, None])
    cluster.apply(policy(stage.namespace, "resident", weight=2))
    stage.wait_ready("resident")
    until(lambda: operator.metric("evenhand_operator_unreadable_namespaces") == 1)
    operator.stop()
    operator.start()
    cluster.apply(policy(stage.namespace, "resident", weight=3))
    stage.wait_ready("resident")
    assert stage.enforced("resident", "weight") == [3, 3]
    until(lambda: operator.metric("evenhand_operator_unreadable_namespaces") == 1)
    change_pool(stage)
