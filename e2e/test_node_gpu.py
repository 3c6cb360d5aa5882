"""The production overlay on a node whose kubelet is told of GPUs that are not there: it is scheduled, starts, and says so in one line."""

import os
import re
from pathlib import Path

import pytest
import yaml

from cluster.client import KubectlError
from cluster.node import NAME
from harness.node_installation import ENGINES, NAMESPACE, REPOSITORY, NodeInstallation
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

RESOURCE, GPUS = "nvidia.com/gpu", 3
NO_GPU = r"evenhand: (CuPy cannot be imported|torch finds no CUDA device).*"
"""One line: the first of the image for CPUs, which is what there is here, the second of that for GPUs."""


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """The production overlay with images that are there, and with requests that fit on a test machine."""
    requests = {"cpu": "100m", "memory": "256Mi"}
    smaller = {"op": "replace", "path": "/spec/template/spec/containers/0/resources/requests", "value": requests}
    kustomization = {
        "resources": [os.path.relpath(REPOSITORY / "manifests/overlays/prod", tmp_path.resolve())],
        "images": [{"name": f"evenhand.dev/{name}", "newTag": "dev"} for name in ("operator", "engine")],
        "patches": [{"target": {"kind": "Deployment", "name": "evenhand-engine"}, "patch": yaml.safe_dump([smaller])}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return tmp_path


def test_production_overlay_has_its_gpus_and_says_that_there_are_none(
    node_installation: NodeInstallation, overlay: Path
) -> None:
    if (node := node_installation.node) is None:
        pytest.skip("the kubelet of the node is not ours to tell of devices")
    before = node_installation.cluster.everything()
    kubectl = node_installation.cluster.kubectl
    kubectl("apply", "-k", f"{REPOSITORY}/crds")
    kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=30s")
    kubectl("apply", "-k", str(overlay))
    until(lambda: len(node_installation.cluster.find("pods", NAMESPACE)) == GPUS)
    unscheduled = [each for each in node_installation.cluster.find("pods", NAMESPACE) if "nodeName" not in each["spec"]]
    assert len(unscheduled) == GPUS, "no node has GPUs yet"

    node.offer(RESOURCE, GPUS)
    kubectl("label", "node", NAME, "nvidia.com/gpu.present=true")

    def says_that_there_are_none() -> bool:
        try:
            said = node_installation.kubectl("logs", ENGINES).strip()
        except KubectlError:  # not started yet
            return False
        return re.fullmatch(NO_GPU, said) is not None

    until(says_that_there_are_none, timeout=120)
    pods = node_installation.cluster.find("pods", NAMESPACE)
    assert {each["spec"].get("nodeName") for each in pods} == {NAME}
    node_installation.uninstall(overlay)
    until(lambda: node_installation.cluster.everything() <= before)
