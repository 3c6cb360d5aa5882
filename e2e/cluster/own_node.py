"""A cluster of one node of our own, in this process's namespaces, which nothing leaves and with which everything ends.

Run as a program (`make node-shell`), it is there for as long as a command runs, with kubectl on the PATH; nothing is installed on it.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster import build, images, node_build
from cluster.control_plane import ControlPlane
from cluster.node import ADDRESS, API_PORT, Node, isolation, prepare_network


def lacking() -> str:
    """Why no node can run here, or nothing."""
    return node_build.missing() or isolation()


@contextlib.contextmanager
def own_node(directory: Path) -> Iterator[tuple[ControlPlane, Node]]:
    """The cluster and its node, which has the images, until the context is left."""
    programs = build.programs() | node_build.programs()
    prepare_network()
    with (
        ControlPlane(programs, directory, ADDRESS, API_PORT) as cluster,
        Node(cluster, programs, images.archives()) as node,
    ):
        yield cluster, node


def main(command: list[str]) -> int:
    """Runs the command, a shell if there is none; the exit status is its own, or 1 where no node can be had."""
    if reason := lacking():
        build.say(f"no node: {reason}")
        return 1
    with tempfile.TemporaryDirectory() as directory, own_node(Path(directory)) as (cluster, _):
        path = f"{build.programs()['kubectl'].parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"KUBECONFIG": str(cluster.kubeconfig), "PATH": path}
        return subprocess.run(command or [os.environ.get("SHELL", "sh")], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
