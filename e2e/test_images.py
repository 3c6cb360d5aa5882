"""The images, built from the Dockerfile as it is, without Docker."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cluster import images

Object = dict[str, Any]


@pytest.fixture(scope="module")
def archives() -> dict[str, Path]:
    if missing := images.missing():
        pytest.skip(f"images {', '.join(missing)} not built (make image-archives)")
    return images.archives()


def test_stages_that_are_kept_for_the_next_build_are_those_that_the_targets_are_made_of() -> None:
    """Those for GPUs are not: nothing here builds them, and they are large."""
    kept = images.stages()
    assert kept == ["build", "operator-packages", "engine-packages", "kernels", "package", "model"]


def read(archive: tarfile.TarFile, blob: str) -> Object:
    """A document of an OCI archive."""
    file = archive.extractfile(blob)
    assert file
    document: Object = json.load(file)
    return document


def blob(descriptor: Object) -> str:
    """Where an OCI archive has it."""
    return f"blobs/{descriptor['digest'].replace(':', '/')}"


@pytest.mark.parametrize(("target", "most_megabytes"), [("operator", 150), ("engine", 1200)])
def test_built_image_is_as_it_should_be(archives: dict[str, Path], target: str, most_megabytes: int) -> None:
    """Sizes are as a registry holds and a node pulls them."""
    with tarfile.open(archives[target]) as archive:
        manifest = read(archive, blob(read(archive, "index.json")["manifests"][0]))
        config = read(archive, blob(manifest["config"]))["config"]
    assert config["User"] == "65532:65532"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert sum(layer["size"] for layer in manifest["layers"]) < most_megabytes * 1e6
