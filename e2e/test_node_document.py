"""docs/install.md, followed word by word on a real node: its commands are run in its order, and leave nothing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster import build
from harness.node_installation import REPOSITORY, NodeInstallation
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

DOCUMENT = REPOSITORY / "docs/install.md"


def commands() -> list[str]:
    """Each block of shell commands."""
    return re.findall(r"^```sh\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


def test_every_command_does_what_it_is_there_for(node_installation: NodeInstallation, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl, which the document asks with")
    before = node_installation.cluster.everything()
    shutil.copy(node_installation.cluster.kubeconfig, tmp_path / "kubeconfig")
    for folder in ("crds", "manifests"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    environment = {
        "PATH": f"{build.programs()['kubectl'].parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
    }
    answers = ""
    for block in commands():
        shell = ["bash", "-e", "-o", "pipefail", "-c", block]
        done = subprocess.run(
            shell, cwd=tmp_path, env=environment, capture_output=True, text=True, input="", timeout=1000
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        if "curl" in block:
            answers = done.stdout
    assert answers.count("Paris") == 2, "each of the two tenants was answered"
    until(lambda: node_installation.cluster.everything() <= before)


def test_document_goes_from_an_empty_cluster_to_an_empty_cluster() -> None:
    text = "".join(commands())
    for step in (
        "apply -k crds",
        "apply -k manifests",
        "create secret",
        "rollout restart",
        "rollout undo",
        "delete -k crds",
    ):
        assert f"kubectl {step}" in text
