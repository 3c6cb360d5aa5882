"""Evenhand on real nodes by Helm: the same two small engines, from the charts."""

import time
from pathlib import Path

from harness.helm import CHART, CRDS_CHART, RELEASE, Helm, setting
from harness.node_installation import (
    IDENTITY,
    NAMESPACE,
    OPERATOR_NAMESPACE,
    REQUESTS,
    SIZES,
    TENANTS,
    NodeInstallation,
)
from harness.objects import policy

SMALL = setting(
    image__tag="dev",
    operator__replicas=1,
    pools__default={
        "replicas": 2,
        "args": SIZES,
        "resources": {"requests": REQUESTS, "limits": {"memory": "4Gi"}},
    },
)


def upgrade(helm: Helm, *options: str | Path) -> None:
    """Installs the release, or brings it to these values."""
    helm("upgrade", "--install", RELEASE, CHART, "-n", OPERATOR_NAMESPACE, *SMALL, *options)


def install(installation: NodeInstallation, helm: Helm) -> float:
    """As charts/README.md says; the seconds from an empty cluster to the first answer to the tenant's Pod."""
    installation.wait_client()
    began = time.monotonic()
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    installation.cluster.create_namespace(OPERATOR_NAMESPACE, **restricted)
    helm("install", "evenhand-crds", CRDS_CHART, "-n", OPERATOR_NAMESPACE, *setting(keep=False))
    upgrade(helm)
    installation.cluster.apply(policy(NAMESPACE, TENANTS, identities=[IDENTITY]))
    installation.wait_pool()
    assert installation.load(1) == {"ok": 1}
    return time.monotonic() - began


def uninstall(installation: NodeInstallation, helm: Helm) -> None:
    """Both releases, and what they leave: namespaces that others may have things in."""
    helm("uninstall", RELEASE, "-n", OPERATOR_NAMESPACE, timeout=200)
    helm("uninstall", "evenhand-crds", "-n", OPERATOR_NAMESPACE)
    delete = ["delete", "namespace", NAMESPACE, OPERATOR_NAMESPACE, "--timeout=350s"]
    installation.cluster.kubectl(*delete, timeout=380)
