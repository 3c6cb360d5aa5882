"""What kustomize makes of our overlays with components that one may add."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import build

MANIFESTS = build.SOURCES.parents[1] / "manifests"

Object = dict[str, Any]


def render(directory: Path, *components: str, overlay: str = "dev") -> list[Object]:
    """The objects; `directory` is for a kustomization. Skips the test where there is no kubectl."""
    if missing := build.missing_programs():
        pytest.skip(f"no kubectl: {', '.join(missing)} not built (make cluster)")

    def relative(name: str) -> str:
        return os.path.relpath(MANIFESTS / name, directory.resolve())

    kustomization = {
        "resources": [relative(f"overlays/{overlay}")],
        "components": [relative(f"components/{name}") for name in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    command = [str(build.programs()["kubectl"]), "kustomize", str(directory)]
    return list(yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
