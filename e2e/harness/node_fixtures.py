"""pytest fixtures around a real node."""

from collections.abc import Iterator

import pytest

from cluster import node_build
from cluster.fixtures import require_control_plane
from cluster.node import isolation
from harness.node_installation import NodeInstallation


@pytest.fixture(scope="session")
def node_installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeInstallation]:
    """The node of this test run, with nothing installed on it."""
    require_control_plane()
    if reason := node_build.missing() or isolation():
        pytest.skip(f"no node: {reason}")
    with NodeInstallation(tmp_path_factory.mktemp("node")) as installation:
        yield installation
