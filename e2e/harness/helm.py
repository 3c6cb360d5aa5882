"""Helm itself, on our charts."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import build

CHARTS = build.SOURCES.parents[1] / "charts"
CHART, CRDS_CHART = CHARTS / "evenhand", CHARTS / "evenhand-crds"
RELEASE, NAMESPACE = "evenhand", "evenhand-system"

Object = dict[str, Any]
Objects = dict[tuple[str, str, str], Object]
"""By kind, namespace and name."""


class HelmError(Exception):
    """Helm ended with another status than 0; the message is what it printed."""


class Helm:
    """Runs it with a home of its own, so that nothing of the user's configuration counts."""

    def __init__(self, home: Path, kubeconfig: Path | None = None) -> None:
        if missing := build.missing_programs():
            pytest.skip(f"no Helm: {', '.join(missing)} not built (make cluster)")
        self._program = build.programs()["helm"]
        self._environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
        if kubeconfig is not None:
            self._environment["KUBECONFIG"] = str(kubeconfig)

    def __call__(self, *arguments: str | Path, timeout: float = 300) -> str:
        """What it prints on standard output. Raises HelmError."""
        command = [str(self._program), *map(str, arguments)]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, input="", timeout=timeout)
        if done.returncode:
            raise HelmError(f"helm {' '.join(map(str, arguments))}: {done.stderr}{done.stdout}".rstrip())
        return done.stdout

    def template(self, *options: str | Path, chart: Path = CHART) -> list[Object]:
        """The objects that it would apply. Raises HelmError."""
        text = self("template", RELEASE, chart, "-n", NAMESPACE, *options)
        return [each for each in yaml.safe_load_all(text) if each]


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    """Helm that knows no cluster."""
    return Helm(tmp_path)


def setting(**values: object) -> list[str]:
    """Options of helm for values; dots are written as two underscores."""
    return [f"--set-json={name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]


def by_name(objects: list[Object]) -> Objects:
    """Each object by kind, namespace and name. Fails where two are one."""
    found = {(each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found
