"""The README's tour of a policy's life: its commands are run, and print what it says."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster import build
from harness.installation import REPOSITORY, Installation
from harness.stage import until

HEADING = "## On Kubernetes"
FENCE = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHANGING = {"AGE", "REVISION"}
"""Columns whose values are of the moment."""


def tour() -> list[tuple[str, str]]:
    """Each fenced block below the heading: its language and content."""
    _, _, section = (REPOSITORY / "README.md").read_text().partition(f"{HEADING}\n")
    return FENCE.findall(section.partition("\n## ")[0])


def essentials(output: str) -> list[str]:
    """The lines, without what changes from run to run and without blanks that only align."""
    lines, columns = [], list[tuple[str, int]]()
    for line in output.splitlines():
        if not line.strip():
            columns = []
            continue
        if line.startswith("NAME "):
            columns = [(found[0], found.start()) for found in re.finditer(r"\S+", line)]
        for name, start in reversed(columns):
            if name in CHANGING:
                line = line[:start] + re.sub(r"^\S+", "", line[start:])
        lines.append(" ".join(line.split()))
    return lines


def test_commands_of_the_tour_print_what_it_says(installation: Installation, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl, which the tour makes a key with")
    shutil.copy(installation.cluster.kubeconfig, tmp_path / "kubeconfig")
    environment = {
        "PATH": f"{build.programs()['kubectl'].parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "KUBE_EDITOR": "sed -i 's/  weight: 4/  weight: 8/'",
    }

    def run(script: str) -> str:
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, input="", timeout=280
        )
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        return done.stdout

    last = ""
    for language, block in tour():
        if language == "sh":
            run(block)
            last = block.splitlines()[-1]
            if "kubectl edit" in block:
                assert installation.enforced("chatbot", "weight") == [8, 8]
        else:  # what the pool says of it may come a moment after what the policy says
            until(lambda last=last, block=block: set(essentials(block)) <= set(essentials(run(last))))
    until(lambda: installation.enforced("chatbot", "weight") == [None, None])
    assert installation.cluster.find("tenantpolicies.evenhand.dev", installation.namespace) == []


def test_tour_shows_every_point_of_a_policys_life_in_forty_lines() -> None:
    commands = "".join(block for language, block in tour() if language == "sh")
    for command in ("apply", "get", "explain", "wait", "edit", "delete"):
        assert f"kubectl {command} " in commands
    assert sum(language == "text" for language, _ in tour()) >= 2
    _, _, section = (REPOSITORY / "README.md").read_text().partition(HEADING)
    assert len(section.partition("\n## ")[0].splitlines()) <= 40
