"""pytest fixtures around a running operator."""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from cluster import build
from cluster.control_plane import ControlPlane
from cluster.fixtures import require_control_plane
from cluster.pod_runner import PodRunner
from evenhand_engine.errors import StartupError
from evenhand_engine.model.source import resolve_model_dir
from harness.installation import Installation, installed
from harness.objects import light_engines, pool
from harness.operator_process import OperatorProcess
from harness.stage import Stage

BASE = build.SOURCES.parents[1] / "manifests" / "base"
OPERATOR_NAMESPACE, OPERATOR = "evenhand-system", "evenhand-operator"
_OF_THE_OPERATOR = {
    "Namespace",
    "ServiceAccount",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "FlowSchema",
}


@pytest.fixture(scope="session")
def operator_kubeconfig(cluster: ControlPlane, crds: None) -> Path:
    """With the rights that the manifests give the operator, and no others."""
    return install_operator_rights(cluster)


def install_operator_rights(cluster: ControlPlane) -> Path:
    """The operator's part of the manifests but for its Deployment; a kubeconfig of its ServiceAccount."""
    rendered = yaml.safe_load_all(cluster.kubectl("kustomize", str(BASE)))
    cluster.apply(*(each for each in rendered if each["kind"] in _OF_THE_OPERATOR))
    return cluster.service_account_kubeconfig(OPERATOR_NAMESPACE, OPERATOR)


class Operators:
    """Starts replicas, with the rights that the manifests give, and sees to it that they end."""

    def __init__(self, cluster: ControlPlane, kubeconfig: Path, logs: Path) -> None:
        self._cluster = cluster
        self._kubeconfig = kubeconfig
        self._logs = logs
        self._started: list[OperatorProcess] = []

    def start(
        self,
        *namespaces: str,
        name: str = "operator",
        wait: bool = True,
        kubeconfig: Path | None = None,
        options: Sequence[str] = (),
        module: str = "evenhand_operator",
    ) -> OperatorProcess:
        """A replica that serves these namespaces, with another kubeconfig or program where one is given."""
        log = self._logs / f"{name}.log"
        operator = OperatorProcess(
            self._cluster, kubeconfig or self._kubeconfig, log, namespaces, *options, module=module
        )
        self._started.append(operator)
        operator.start(wait)
        return operator

    def close(self) -> None:
        """Ends all, and lets the next ones lead at once."""
        for operator in self._started:
            operator.stop()
        self._cluster.kubectl("delete", "lease", OPERATOR, "-n", OPERATOR_NAMESPACE, "--ignore-not-found")


@pytest.fixture(scope="module")
def operators(
    cluster: ControlPlane, operator_kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operators]:
    """For the tests of a module."""
    operators = Operators(cluster, operator_kubeconfig, tmp_path_factory.mktemp("operators"))
    yield operators
    operators.close()


@pytest.fixture(scope="module")
def served_namespace(cluster: ControlPlane, operator_kubeconfig: Path) -> Iterator[str]:
    """A namespace for the tests of a module, which the operator may serve."""
    yield from new_served_namespace(cluster)


@pytest.fixture(scope="module")
def other_namespace(cluster: ControlPlane, operator_kubeconfig: Path) -> Iterator[str]:
    """Another one."""
    yield from new_served_namespace(cluster)


def new_served_namespace(cluster: ControlPlane) -> Iterator[str]:
    """A namespace with the RoleBindings that the manifests make, while it is iterated."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.create_namespace(name)
    account = f"--serviceaccount={OPERATOR_NAMESPACE}:{OPERATOR}"
    for role in (OPERATOR, f"{OPERATOR}-pools"):
        cluster.kubectl("create", "rolebinding", role, f"--clusterrole={role}", account, "-n", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
    cluster.kubectl("delete", "pods", "--all", "-n", name, "--force", "--wait=false")


@pytest.fixture(scope="module")
def pods(cluster: ControlPlane, served_namespace: str) -> Iterator[PodRunner]:
    """Runs the Pods of the served namespace."""
    with PodRunner(cluster, served_namespace) as runner:
        yield runner


@pytest.fixture(scope="module")
def stage(cluster: ControlPlane, served_namespace: str, pods: PodRunner) -> Stage:
    """Two light engines and their pool; the operator, without which they are not ready, is for the test to start."""
    cluster.apply(pool(served_namespace), light_engines(served_namespace, 2))
    return Stage(cluster, served_namespace)


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """The whole of it: the operator and two engines with the default model, as the dev overlay installs them."""
    require_control_plane()
    try:
        resolve_model_dir(None)
    except StartupError as error:
        pytest.skip(f"the default model cannot be had: {error}")
    with installed(tmp_path_factory.mktemp("installation")) as installation:
        yield installation
