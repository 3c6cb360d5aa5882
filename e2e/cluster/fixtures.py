"""pytest fixtures that any test may ask for: a control plane for the whole run, a namespace for one test."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import build
from cluster.control_plane import ControlPlane

CRDS = build.SOURCES.parents[1] / "crds"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The control plane of this test run, started when the first test asks for it."""
    with new_control_plane(tmp_path_factory.mktemp("cluster")) as control_plane:
        yield control_plane


def require_control_plane() -> None:
    """Skips the test, with the reason, where the programs of a control plane are not built."""
    if missing := build.missing_programs():
        pytest.skip(f"no control plane: {', '.join(missing)} not built (make cluster)")


def new_control_plane(directory: Path) -> ControlPlane:
    """One that is not started, for who cannot share the run's. Skips the test where it cannot be had."""
    require_control_plane()
    return ControlPlane(build.programs(), directory)


@pytest.fixture(scope="session")
def crds(cluster: ControlPlane) -> None:
    """Evenhand's own kinds, known to the API server."""
    install_crds(cluster)


def install_crds(cluster: ControlPlane) -> None:
    """Returns once the API server knows Evenhand's own kinds."""
    files = [f"--filename={path}" for path in sorted(CRDS.glob("evenhand.dev_*.yaml"))]
    cluster.kubectl("apply", "--server-side", "--validate=strict", *files)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=120s", *files)


@pytest.fixture
def namespace(cluster: ControlPlane) -> Iterator[str]:
    """A fresh namespace in which Pods can be made; it is deleted after the test."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.create_namespace(name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
    # no kubelet is left that would say that they have ended
    cluster.kubectl("delete", "pods", "--all", "-n", name, "--force", "--wait=false")
