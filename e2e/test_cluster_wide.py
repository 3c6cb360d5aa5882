"""An operator of the whole cluster, with the rights of the production overlay: guests whose labels change, two pools, strangers."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import build
from cluster.control_plane import ControlPlane
from cluster.fixtures import install_crds, new_control_plane
from cluster.pod_runner import PodRunner
from harness.fixtures import OPERATOR, OPERATOR_NAMESPACE, install_operator_rights
from harness.objects import Object, api_key, light_engines, policy, pool, secret, service_account
from harness.operator_process import OperatorProcess
from harness.stage import Stage, conditions, until

ALL_NAMESPACES = build.SOURCES.parents[1] / "manifests/components/all-namespaces"
HOME = "models"
TENANT = {"evenhand.dev/tenant": "true"}
NUM_STRANGERS = 500
MOST_MEMORY_MIB = 200
KEY = "a-key-that-nobody-can-guess-{}".format


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One of its own, since the operator looks at all of it."""
    with new_control_plane(tmp_path_factory.mktemp("wide")) as cluster:
        install_crds(cluster)
        cluster.create_namespace(HOME)
        yield cluster


@pytest.fixture(scope="module")
def kubeconfig(control_plane: ControlPlane) -> Path:
    """With the rights of the base, and those of the component that the production overlay adds."""
    kubeconfig = install_operator_rights(control_plane)
    control_plane.apply(*yaml.safe_load_all((ALL_NAMESPACES / "rbac.yaml").read_text()))
    account = f"--serviceaccount={OPERATOR_NAMESPACE}:{OPERATOR}"
    control_plane.kubectl("create", "rolebinding", "pools", f"--clusterrole={OPERATOR}-pools", account, "-n", HOME)
    return kubeconfig


@pytest.fixture(scope="module")
def stage(control_plane: ControlPlane, kubeconfig: Path) -> Iterator[Stage]:
    """Two pools with an engine each; the first admits labelled namespaces, and grants one team more."""
    gold = {"namespaces": {"matchLabels": {"team": "gold"}}, "maxWeight": 10, "identityTypes": ["APIKey", "Header"]}
    allowed = {"from": "Selector", "selector": {"matchLabels": TENANT}}
    with PodRunner(control_plane, HOME):
        control_plane.apply(
            pool(HOME, selector={"matchLabels": {"engines": "engines"}}, allowedNamespaces=allowed, grants=[gold]),
            pool(HOME, "second", selector={"matchLabels": {"engines": "second"}}),
            light_engines(HOME, 1),
            light_engines(HOME, 1, pool="second", name="second"),
        )
        yield Stage(control_plane, HOME)


@pytest.fixture(scope="module")
def operator(
    control_plane: ControlPlane, kubeconfig: Path, stage: Stage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    log = tmp_path_factory.mktemp("operator") / "operator.log"
    with OperatorProcess(control_plane, kubeconfig, log, (), "--pod-selector=evenhand.dev/pool") as operator:
        until(lambda: len(stage.ready_pods()) == 2)
        yield operator


@pytest.fixture
def guest(control_plane: ControlPlane, operator: OperatorProcess) -> Iterator[Stage]:
    """A namespace of its own for one test, labelled as a tenant's."""
    name = f"guest-{secrets.token_hex(4)}"
    control_plane.create_namespace(name)
    label(control_plane, name, **TENANT)
    yield Stage(control_plane, name)
    control_plane.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


def label(cluster: ControlPlane, namespace: str, **labels: str | None) -> None:
    """Set labels of a namespace; None removes one."""
    changes = [f"{key}-" if value is None else f"{key}={value}" for key, value in labels.items()]
    cluster.kubectl("label", "namespace", namespace, "--overwrite", *changes)


def guest_policy(guest: Stage, name: str, **spec: object) -> Object:
    return policy(guest.namespace, name, **{"poolRef": {"name": "default", "namespace": HOME}} | spec)


def tenants(stage: Stage) -> dict[str, dict[str, Object]]:
    """By pool and name, as the engines enforce them."""
    return {
        document["config"]["pool"]["name"]: {each["tenantId"]: each for each in document["config"]["tenants"]}
        for document in stage.documents()
    }


def test_guest_is_served_while_its_namespace_has_the_label(
    control_plane: ControlPlane, stage: Stage, guest: Stage
) -> None:
    control_plane.apply(guest_policy(guest, "web", identities=[service_account("frontend")]))
    guest.wait_ready("web")
    name = f"{guest.namespace}/web"
    assert tenants(stage)["default"][name]["serviceAccounts"] == [f"system:serviceaccount:{guest.namespace}:frontend"]
    label(control_plane, guest.namespace, **{"evenhand.dev/tenant": None})
    until(lambda: name not in tenants(stage)["default"])
    guest.wait_refused("web", "NotAllowed")
    label(control_plane, guest.namespace, **TENANT)
    guest.wait_ready("web")
    assert name in tenants(stage)["default"]


def test_label_that_a_grant_selects_by_widens_and_narrows_what_is_granted(
    control_plane: ControlPlane, stage: Stage, guest: Stage
) -> None:
    control_plane.apply(guest_policy(guest, "web", weight=10))
    guest.wait_refused("web", "ExceedsGrant")
    label(control_plane, guest.namespace, team="gold")
    guest.wait_ready("web")
    assert tenants(stage)["default"][f"{guest.namespace}/web"]["weight"] == 10
    label(control_plane, guest.namespace, team="tin")
    until(lambda: f"{guest.namespace}/web" not in tenants(stage)["default"])


def test_namespace_is_created_labelled_and_filled_at_once(control_plane: ControlPlane, stage: Stage) -> None:
    """The policy may be seen before its namespace."""
    name = f"team-{secrets.token_hex(4)}"
    labelled = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": TENANT}}
    team = Stage(control_plane, name)
    control_plane.apply(labelled, guest_policy(team, "web"))
    team.wait_ready("web")
    assert f"{name}/web" in tenants(stage)["default"]


def test_each_pool_has_its_own_tenants(control_plane: ControlPlane, stage: Stage, operator: OperatorProcess) -> None:
    control_plane.apply(policy(HOME, "one"), policy(HOME, "two", poolRef={"name": "second"}))
    stage.wait_ready("one", "two")
    assert "one" in tenants(stage)["default"] and "two" not in tenants(stage)["default"]
    assert list(tenants(stage)["second"]) == ["two"]
    until(lambda: [stage.pool(name)["status"]["applied"] for name in ("default", "second")] == ["1/1", "1/1"])


def test_keys_in_a_secret_of_our_type_and_in_an_opaque_one(
    control_plane: ControlPlane, stage: Stage, guest: Stage
) -> None:
    ours = secret(guest.namespace, "ours", key=KEY("ours")) | {"type": "evenhand.dev/api-keys"}
    opaque = secret(guest.namespace, "opaque", key=KEY("opaque"))
    control_plane.apply(guest_policy(guest, "web", identities=[api_key("ours"), api_key("opaque", "old")]))
    guest.wait_refused("web", "SecretNotFound")
    control_plane.apply(ours, opaque)
    guest.wait_ready("web")
    name = f"{guest.namespace}/web"
    assert len(tenants(stage)["default"][name]["keyHashes"]) == 2
    for each in ("ours", "opaque"):
        guest.kubectl("patch", "secret", each, "--type=merge", "-p", '{"metadata": {"finalizers": ["tests/held"]}}')
        guest.kubectl("delete", "secret", each, "--wait=false")
        until(lambda: name not in tenants(stage)["default"])  # it is held by its finalizer, and counts for nothing
        guest.kubectl("patch", "secret", each, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
        control_plane.apply(ours, opaque)
        until(lambda: name in tenants(stage)["default"])


def test_deleted_namespace_takes_its_tenants_with_it_and_no_others(
    control_plane: ControlPlane, stage: Stage, guest: Stage
) -> None:
    control_plane.apply(guest_policy(guest, "web"), policy(HOME, "resident"))
    guest.wait_ready("web")
    stage.wait_ready("resident")
    control_plane.kubectl("delete", "namespace", guest.namespace, "--wait=false")
    until(lambda: f"{guest.namespace}/web" not in tenants(stage)["default"])
    assert "resident" in tenants(stage)["default"]
    control_plane.apply(policy(HOME, "resident", weight=3))
    stage.wait_ready("resident")


def test_renamed_pool_gets_its_policies_and_engines(
    control_plane: ControlPlane, stage: Stage, operator: OperatorProcess
) -> None:
    control_plane.apply(policy(HOME, "moving", poolRef={"name": "second"}))
    stage.wait_ready("moving")
    stage.kubectl("delete", "epool", "second")
    stage.wait("Accepted=false", "moving")
    assert stage.conditions("moving")["Accepted"] == ("False", "PoolNotFound")
    control_plane.apply(
        pool(HOME, "renamed", selector={"matchLabels": {"engines": "second"}}),
        policy(HOME, "moving", poolRef={"name": "renamed"}),
        light_engines(HOME, 1, pool="renamed", name="second"),
    )
    until(lambda: list(tenants(stage).get("renamed", ())) == ["moving"])
    stage.wait_ready("moving")
    until(lambda: conditions(stage.pool("renamed"))["Ready"] == ("True", "Ready"))


def test_second_installation_leaves_the_pools_alone_and_says_so(
    control_plane: ControlPlane, stage: Stage, operator: OperatorProcess, tmp_path: Path
) -> None:
    """Somebody starts an operator on a laptop, with all rights and a Lease elsewhere."""
    control_plane.apply(policy(HOME, "contested", weight=2))
    stage.wait_ready("contested")
    before = reported(stage)
    assert before["operator"] == "evenhand-system/evenhand-operator"
    options = ("--pod-selector=evenhand.dev/pool", "--lease-namespace=default")
    second = OperatorProcess(control_plane, control_plane.kubeconfig, tmp_path / "second.log", (), *options)
    with second:
        until(lambda: conditions(stage.pool()).get("ForeignOperator") == ("True", "ForeignOperator"))
        assert second.metric("evenhand_operator_is_leader") == 1, "of its own Lease"
        num_pools = len(control_plane.find("enginepools.evenhand.dev", HOME))
        until(lambda: second.metric("evenhand_operator_foreign_pools") == num_pools)
        control_plane.apply(policy(HOME, "contested", weight=5))
        stage.wait_ready("contested")
        assert stage.enforced("contested", "weight")[0] == 5
        assert second.metric("evenhand_operator_api_writes_total", resource="tenantpolicies/status") == 0
    until(lambda: "ForeignOperator" not in conditions(stage.pool()))  # it took it back before it ended
    after = reported(stage)
    assert after["operator"] == before["operator"]
    assert after["revision"] == before["revision"] + 1, "nobody pushed but its own operator"


def reported(stage: Stage) -> Object:
    """The pool's status, once it tells of what its engine enforces."""

    def is_up_to_date() -> bool:
        revisions = {each["config"]["pool"]["name"]: each["revision"] for each in stage.documents()}
        return bool(stage.pool()["status"]["revision"] == revisions["default"])

    until(is_up_to_date)
    return dict(stage.pool()["status"])


def test_strangers_cost_nothing(control_plane: ControlPlane, stage: Stage, operator: OperatorProcess) -> None:
    """Pods and Secrets of everybody else: neither is sent to the operator, whose memory does not know them."""
    control_plane.create_namespace("strangers")
    ballast = {str(index): "x" * 4000 for index in range(8)}
    container = {"name": "main", "image": "stranger"}
    for start in range(0, NUM_STRANGERS, 100):
        names = [f"stranger-{index}" for index in range(start, start + 100)]
        control_plane.apply(
            *(secret("strangers", name, **ballast) for name in names),
            *(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": name, "namespace": "strangers"},
                    "spec": {"containers": [container]},
                }
                for name in names
            ),
        )
    operator.stop()
    operator.start()
    control_plane.apply(policy(HOME, "after-the-start"))
    stage.wait_ready("after-the-start")
    assert psutil.Process(operator.program.pid).memory_info().rss < MOST_MEMORY_MIB * 2**20
