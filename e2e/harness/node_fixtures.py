"""pytest fixtures around real nodes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import build
from cluster.client import Cluster
from cluster.fixtures import require_control_plane
from cluster.own_node import lacking, own_node
from harness.node_installation import NodeInstallation

KUBECONFIG = "EVENHAND_KUBECONFIG"
"""Of a cluster to use instead of a node of our own, whose nodes have the images already, and in which nothing of ours is."""


@pytest.fixture(scope="session")
def node_installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeInstallation]:
    """The node of this test run, with nothing installed on it."""
    require_control_plane()
    directory = tmp_path_factory.mktemp("node")
    if path := os.environ.get(KUBECONFIG):
        with NodeInstallation(Cluster(build.programs(), directory, Path(path).resolve()), directory) as installation:
            yield installation
        return
    if reason := lacking():
        pytest.skip(f"no node: {reason}")
    with own_node(directory) as (cluster, node), NodeInstallation(cluster, directory, node) as installation:
        yield installation
