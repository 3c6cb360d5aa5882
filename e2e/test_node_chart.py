"""On a real node by Helm: from an empty cluster to an answer, an update without a failed request, and an uninstallation.

The tests are one story, in this order.
"""

from pathlib import Path

import pytest

from harness.helm import CHART, CRDS_CHART, RELEASE, Helm, setting
from harness.node_installation import IDENTITY, NAMESPACE, OPERATOR_NAMESPACE, SIZES, TENANTS, NodeInstallation
from harness.objects import policy
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(420)]

SMALL = setting(
    image__tag="dev",
    operator__replicas=1,
    pools__default={
        "replicas": 2,
        "args": SIZES,
        "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
    },
)


@pytest.fixture(scope="module")
def helm(node_installation: NodeInstallation, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"), node_installation.cluster.kubeconfig)


@pytest.fixture(scope="module")
def before(node_installation: NodeInstallation) -> set[str]:
    """Everything in the cluster before anything of ours was."""
    return node_installation.everything()


def upgrade(helm: Helm, *options: str | Path) -> None:
    helm("upgrade", "--install", RELEASE, CHART, "-n", OPERATOR_NAMESPACE, *SMALL, *options)


def test_engines_answer_a_pod_once_they_are_installed(
    node_installation: NodeInstallation, helm: Helm, before: set[str]
) -> None:
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    node_installation.cluster.create_namespace(OPERATOR_NAMESPACE, **restricted)
    helm("install", "evenhand-crds", CRDS_CHART, "-n", OPERATOR_NAMESPACE, *setting(keep=False))
    upgrade(helm)
    node_installation.cluster.apply(policy(NAMESPACE, TENANTS, identities=[IDENTITY]))
    wait = ["wait", "enginepool/default", "--for=condition=Ready", "--timeout=180s"]
    node_installation.kubectl(*wait, timeout=200)
    assert node_installation.load(2) == {"ok": 2}


def test_update_by_values_fails_no_request(node_installation: NodeInstallation, helm: Helm, before: set[str]) -> None:
    node_installation.wait_serving(2)
    with node_installation.under_load(requests=300, at_once=2, seconds=60) as outcomes:
        upgrade(helm, *setting(pools__default__podAnnotations={"example.org/generation": "2"}))
        node_installation.roll_out()
    assert outcomes == {"ok": 300}


def test_uninstalling_leaves_what_others_may_have_things_in(
    node_installation: NodeInstallation, helm: Helm, before: set[str]
) -> None:
    helm("uninstall", RELEASE, "-n", OPERATOR_NAMESPACE, timeout=200)
    helm("uninstall", "evenhand-crds", "-n", OPERATOR_NAMESPACE)
    names = node_installation.cluster.kubectl
    names("delete", "namespace", NAMESPACE, OPERATOR_NAMESPACE, "--timeout=350s", timeout=380)
    until(lambda: node_installation.everything() <= before, timeout=60)
