"""On a real node whose NetworkPolicies are enforced: who reaches which port, and that what must be reached is."""

from collections.abc import Iterator

import pytest

from harness.node_installation import CLIENT, OPERATOR, OPERATOR_NAMESPACE, TENANTS, NodeInstallation
from harness.stage import until

pytestmark = [pytest.mark.node, pytest.mark.timeout(420)]

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3).close()
except TimeoutError:
    print("dropped")
except ConnectionRefusedError:
    print("refused")
else:
    print("open")
"""


@pytest.fixture(scope="module")
def installation(node_installation: NodeInstallation) -> Iterator[NodeInstallation]:
    """Installed, and answering a tenant: so names, the API server, the public port and the operator's pushes get through."""
    before = node_installation.everything()
    node_installation.install()
    node_installation.wait_serving(2)
    yield node_installation
    node_installation.uninstall()
    until(lambda: node_installation.everything() <= before, timeout=60)


def reaches(installation: NodeInstallation, namespace: str, name: str, address: str, port: int) -> bool:
    """Whether a TCP connection is made from inside a Pod."""
    program = ["exec", name, "-n", namespace, "--", "python", "-c", CONNECT, address, str(port)]
    outcome = installation.cluster.kubectl(*program, timeout=30).strip()
    assert outcome in ("open", "refused", "dropped"), outcome
    return outcome == "open"


def test_tenants_reach_the_public_port_and_only_the_operator_the_admin_port(installation: NodeInstallation) -> None:
    for pod in installation.ready_pods():
        address = pod["status"]["podIP"]
        assert reaches(installation, TENANTS, CLIENT, address, 8000)
        assert not reaches(installation, TENANTS, CLIENT, address, 9000)
        assert reaches(installation, OPERATOR_NAMESPACE, OPERATOR, address, 9000)


def test_engines_call_nobody(installation: NodeInstallation) -> None:
    client = installation.cluster.get("pod", CLIENT, TENANTS)
    engine, other = installation.ready_pods()
    addresses = {(other["status"]["podIP"], 8000), (client["status"]["podIP"], 80), installation.api_server()}
    for address, port in addresses:
        assert not reaches(installation, installation.namespace, engine["metadata"]["name"], address, port)
