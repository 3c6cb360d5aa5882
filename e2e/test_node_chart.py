"""On a real node by Helm: from an empty cluster to an answer, an update without a failed request, and an uninstallation.

The tests are one story, in this order.
"""

import pytest

from harness.helm import Helm, setting
from harness.node_chart import install, uninstall, upgrade
from harness.node_installation import NodeInstallation
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def helm(node_installation: NodeInstallation, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"), node_installation.cluster.kubeconfig)


@pytest.fixture(scope="module")
def before(node_installation: NodeInstallation) -> set[str]:
    """Everything in the cluster before anything of ours was."""
    return node_installation.cluster.everything()


def test_engines_answer_a_pod_once_they_are_installed(
    node_installation: NodeInstallation, helm: Helm, before: set[str]
) -> None:
    install(node_installation, helm)
    assert node_installation.load(2) == {"ok": 2}


def test_update_by_values_fails_no_request(node_installation: NodeInstallation, helm: Helm, before: set[str]) -> None:
    node_installation.wait_serving(2)
    with node_installation.under_load(at_once=2, per_second=5) as outcomes:
        upgrade(helm, *setting(pools__default__podAnnotations={"example.org/generation": "2"}))
        node_installation.roll_out()
    assert outcomes.keys() == {"ok"}


def test_uninstalling_leaves_what_others_may_have_things_in(
    node_installation: NodeInstallation, helm: Helm, before: set[str]
) -> None:
    uninstall(node_installation, helm)
    until(lambda: node_installation.cluster.everything() <= before)
