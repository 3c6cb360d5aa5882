"""On a real node whose NetworkPolicies are enforced: who reaches which port, and that what must be reached is."""

from collections.abc import Iterator

import pytest

from harness.node_installation import CLIENT, OPERATOR, OPERATOR_NAMESPACE, TENANTS, NodeInstallation
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(1200)]

CONNECT = """
import socket, sys
for target in sys.argv[1:]:
    address, port = target.split(":")
    try:
        socket.create_connection((address, int(port)), timeout=2).close()
    except (TimeoutError, ConnectionRefusedError):
        continue
    print(target)
"""
"""Prints which targets it reaches."""


@pytest.fixture(scope="module")
def installation(node_installation: NodeInstallation) -> Iterator[NodeInstallation]:
    """Installed, and answering a tenant: so names, the API server, the public port and the operator's pushes get through."""
    before = node_installation.cluster.everything()
    node_installation.install()
    node_installation.wait_serving(2)
    yield node_installation
    node_installation.uninstall()
    until(lambda: node_installation.cluster.everything() <= before)


def reached(installation: NodeInstallation, namespace: str, name: str, *targets: str) -> list[str]:
    """Those of the targets, ADDRESS:PORT, to which a connection is made from inside a Pod."""
    program = ["exec", name, "-n", namespace, "--", "python", "-c", CONNECT, *targets]
    return installation.cluster.kubectl(*program, timeout=30).split()


def test_tenants_reach_the_public_port_and_only_the_operator_the_admin_port(installation: NodeInstallation) -> None:
    """In the end: until a policy is known for a new Pod, some networks let everything through."""
    for pod in installation.ready_pods():
        public, admin = (f"{pod['status']['podIP']}:{port}" for port in (8000, 9000))

        def holds(public: str = public, admin: str = admin) -> bool:
            from_tenant = reached(installation, TENANTS, CLIENT, public, admin)
            from_operator = reached(installation, OPERATOR_NAMESPACE, OPERATOR, public, admin)
            return (from_tenant, from_operator) == ([public], [admin])

        until(holds)


def test_engines_call_nobody(installation: NodeInstallation) -> None:
    """Another engine is not asked for: kube-router takes what a policy lets in for what it lets out, where both ends are of one."""
    client = ["exec", CLIENT, "-n", TENANTS, "--", "sh", "-c"]
    installation.cluster.kubectl(*client, "python -m http.server 8080 >/dev/null 2>&1 &")
    address = installation.cluster.get("pod", CLIENT, TENANTS)["status"]["podIP"]
    targets = [f"{address}:8080", installation.api_server()]
    until(lambda: reached(installation, TENANTS, CLIENT, *targets) == targets)  # who has no policy reaches both
    for engine in installation.ready_pods():
        inside = installation.namespace, engine["metadata"]["name"]
        until(lambda inside=inside: reached(installation, *inside, *targets) == [])
