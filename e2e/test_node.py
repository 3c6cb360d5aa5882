"""On a real node, from an empty cluster to an empty cluster: installed, used by a Pod, changed, upgraded, rolled back, removed.

The tests are one story, in this order.
"""

import pytest

from cluster.client import KubectlError
from harness.node_installation import (
    ENGINES,
    NAMESPACE,
    OPERATOR,
    OPERATOR_NAMESPACE,
    NodeInstallation,
)
from harness.stage import is_ready, until

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def installation(node_installation: NodeInstallation) -> NodeInstallation:
    """As the first test has left it, and the others after it."""
    return node_installation


@pytest.fixture(scope="module")
def before(installation: NodeInstallation) -> set[str]:
    """Everything in the cluster before anything of ours was."""
    return installation.cluster.everything()


def test_engines_answer_a_pod_once_they_are_installed(installation: NodeInstallation, before: set[str]) -> None:
    installation.install()
    until(lambda: all(is_ready(pod) for pod in installation.pods()))  # the pool is, with one of its engines
    assert installation.restarts() == 0


def test_pods_run_as_the_restricted_profile_asks(installation: NodeInstallation, before: set[str]) -> None:
    for namespace, deployment in ((NAMESPACE, ENGINES), (OPERATOR_NAMESPACE, OPERATOR)):
        labels = installation.cluster.get("namespace", namespace)["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
        inside = "id -u; touch /opt/evenhand/x 2>&1; grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/1/status"
        said = installation.cluster.kubectl("exec", deployment, "-n", namespace, "--", "sh", "-c", inside).split()
        assert said[0] == "65532"
        assert "Read-only file system" in " ".join(said)
        assert said[-6:] == ["CapEff:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp:", "2"]


def test_engines_need_no_compiler_and_no_package_client(installation: NodeInstallation, before: set[str]) -> None:
    inside = "for each in g++ gcc c++ uv; do command -v $each; done; ls /var/cache/evenhand; echo done"
    said = installation.cluster.kubectl("exec", ENGINES, "-n", NAMESPACE, "--", "sh", "-c", inside)
    assert said.split() == ["done"]
    log = installation.kubectl("logs", ENGINES)
    assert "falling back" not in log


def test_token_of_a_service_account_is_an_identity_and_a_change_is_enforced(
    installation: NodeInstallation, before: set[str]
) -> None:
    installation.wait_ready("chat")
    assert installation.load(6, 2) == {"ok": 6}
    installation.kubectl("patch", "tpol", "chat", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    installation.wait_ready("chat")
    assert installation.load(6, 2) == {"tenant_suspended": 6}
    installation.kubectl("patch", "tpol", "chat", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    installation.wait_ready("chat")
    assert installation.load(6, 2) == {"ok": 6}


def test_rolling_update_under_load_fails_no_request(installation: NodeInstallation, before: set[str]) -> None:
    old = {pod["metadata"]["uid"] for pod in installation.cluster.find("pods", NAMESPACE)}
    with installation.under_load(at_once=4, per_second=13, at_least=1000) as outcomes:
        installation.kubectl("set", "env", ENGINES, "GENERATION=2")
        installation.roll_out()
    assert outcomes.keys() == {"ok"} and outcomes["ok"] >= 1000
    assert not old & {pod["metadata"]["uid"] for pod in installation.ready_pods()}


def test_update_to_an_image_that_is_not_there_is_rolled_back_without_a_failed_request(
    installation: NodeInstallation, before: set[str]
) -> None:
    with installation.under_load(at_once=2, per_second=8) as outcomes:
        installation.kubectl("set", "image", ENGINES, "engine=evenhand.dev/engine:missing")

        def pulling_fails() -> bool:
            states = [
                status["state"]
                for pod in installation.cluster.find("pods", NAMESPACE)
                for status in pod["status"].get("containerStatuses", [])
            ]
            return any(
                state.get("waiting", {}).get("reason") in ("ErrImagePull", "ImagePullBackOff") for state in states
            )

        until(pulling_fails)
        assert len(installation.ready_pods()) == 1, "the other engine was left alone"
        installation.kubectl("rollout", "undo", ENGINES)
        installation.roll_out()
    assert outcomes.keys() == {"ok"}


def test_operator_is_replaced_while_engines_run(installation: NodeInstallation, before: set[str]) -> None:
    engines = {pod["metadata"]["uid"] for pod in installation.ready_pods()}
    with installation.under_load(at_once=2, per_second=10) as outcomes:
        installation.cluster.kubectl("rollout", "restart", OPERATOR, "-n", OPERATOR_NAMESPACE)
        installation.roll_out(OPERATOR)
    assert outcomes.keys() == {"ok"}
    installation.kubectl("patch", "tpol", "chat", "--type=merge", "-p", '{"spec": {"weight": 7}}')
    installation.wait_ready("chat")
    assert engines == {pod["metadata"]["uid"] for pod in installation.ready_pods()}
    assert installation.restarts() == 0


def test_uninstalling_leaves_nothing(installation: NodeInstallation, before: set[str]) -> None:
    installation.uninstall()

    until(lambda: installation.cluster.everything() <= before)
    with pytest.raises(KubectlError, match="not found"):
        installation.cluster.get("namespace", NAMESPACE)
