"""On a real node: what happens to Pods of a cluster that lives. The tests are one story, in this order."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.client import KubectlError
from harness.node_installation import OPERATOR, OPERATOR_NAMESPACE, REPOSITORY, NodeInstallation
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

HOGS = """
import os, time
for _ in range(64):
    if os.fork() == 0:
        held = b"x" * (80 << 20)
        time.sleep(60)
os.wait()
"""
"""Many small processes: it is the largest one that is killed for the memory they take, the engine's."""


@pytest.fixture(scope="module")
def installation(node_installation: NodeInstallation) -> Iterator[NodeInstallation]:
    """Two engines that serve one tenant, and nothing at the end."""
    before = node_installation.cluster.everything()
    node_installation.install()
    yield node_installation
    node_installation.uninstall()
    until(lambda: node_installation.cluster.everything() <= before)


def test_drained_node_keeps_an_engine_until_another_serves(installation: NodeInstallation) -> None:
    """There is one node: what is evicted finds no other place, so the budget keeps the other engine, and no request fails."""
    installation.wait_serving(2)
    nodes = {pod["spec"]["nodeName"] for pod in installation.ready_pods()}
    if len(installation.cluster.find("nodes")) > 1:
        pytest.skip("there are several nodes: what is evicted finds a place")
    drain = ["drain", *nodes, "--pod-selector=app=evenhand-engine", "--delete-emptydir-data", "--timeout=30s"]
    with installation.under_load(at_once=2, per_second=3) as outcomes:
        with pytest.raises(KubectlError, match="disruption budget"):
            installation.cluster.kubectl(*drain)
        until(lambda: len(installation.ready_pods()) == 1)
        installation.cluster.kubectl("uncordon", *nodes)
    assert outcomes.keys() == {"ok"}
    until(lambda: len(installation.ready_pods()) == 2)


def test_engine_killed_for_its_memory_comes_back_with_its_config(installation: NodeInstallation) -> None:
    """Also while there is no operator to tell it: the config outlives the container."""
    installation.wait_serving(2)
    scale = ["scale", OPERATOR, "-n", OPERATOR_NAMESPACE]
    installation.cluster.kubectl(*scale, "--replicas=0")
    victim = installation.ready_pods()[0]["metadata"]["name"]

    def status() -> dict[str, Any]:
        [found] = installation.cluster.get("pod", victim, installation.namespace)["status"]["containerStatuses"]
        return dict(found)

    inside = ["exec", "-i", victim, "-n", installation.namespace, "--", "python", "-"]
    with contextlib.suppress(KubectlError):  # the hogs end with their container, however that is told
        installation.cluster.kubectl(*inside, stdin=HOGS, timeout=180)
    until(lambda: status()["restartCount"] >= 1)
    assert status()["lastState"]["terminated"]["reason"] == "OOMKilled"
    until(lambda: len(installation.ready_pods()) == 2)
    assert installation.load(20, 2) == {"ok": 20}, "the tenant is known to both"
    installation.cluster.kubectl(*scale, "--replicas=1")
    installation.wait_serving(2)


def test_definitions_applied_again_keep_objects(installation: NodeInstallation) -> None:
    engines = {pod["metadata"]["uid"] for pod in installation.ready_pods()}
    kept = installation.policy("chat")["metadata"]["uid"]
    installation.cluster.kubectl("apply", "-k", f"{REPOSITORY}/crds")
    installation.kubectl("patch", "tpol", "chat", "--type=merge", "-p", '{"spec": {"weight": 5}}')
    installation.wait_ready("chat")
    assert installation.policy("chat")["metadata"]["uid"] == kept
    assert {pod["metadata"]["uid"] for pod in installation.ready_pods()} == engines
