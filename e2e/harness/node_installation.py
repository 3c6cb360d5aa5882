"""Evenhand on real nodes: installed by kubectl from the manifests, in containers of the images, used by a Pod of a tenant."""

import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml

from cluster import build
from cluster.client import Cluster
from cluster.node import Node
from harness import cluster_client
from harness.objects import policy
from harness.stage import Stage

REPOSITORY = build.SOURCES.parents[1]
NAMESPACE, OPERATOR_NAMESPACE, TENANTS = "inference", "evenhand-system", "chat"
ENGINES, OPERATOR = "deployment/evenhand-engine", "deployment/evenhand-operator"
CLIENT = "client"
IDENTITY = {"name": "pods", "type": "ServiceAccount", "serviceAccount": {"name": CLIENT, "namespace": TENANTS}}
SIZES = ["--max-num-batched-tokens=64", "--max-num-seqs=8", "--max-model-len=1024", "--kv-cache-memory-bytes=128M"]
"""Engines of which two fit on a test machine beside everything else."""

REQUESTS = {"cpu": "200m", "memory": "1Gi", "ephemeral-storage": "256Mi"}

Object = dict[str, Any]


class NodeInstallation(Stage):
    """A cluster with real nodes: ours, or another's that a kubeconfig leads to. It is empty but for the tenant's Pod.

    Attributes:
        node: the node, where it is ours alone; None: others' are not to be touched.
    """

    def __init__(self, cluster: Cluster, directory: Path, node: Node | None = None) -> None:
        super().__init__(cluster, NAMESPACE)
        self.node = node
        self._directory = directory

    def __enter__(self) -> Self:
        self.cluster.create_namespace(TENANTS)
        self.cluster.apply(*client())
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.kubectl("delete", "namespace", TENANTS, "--timeout=180s", timeout=200)

    def install(self, overlay: Path | None = None) -> float:
        """As manifests/README.md says; the seconds from an empty cluster to the first answer to the tenant's Pod."""
        self.wait_client()
        kubectl = self.cluster.kubectl
        began = time.monotonic()
        kubectl("apply", "-k", str(REPOSITORY / "crds"))
        kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=120s")
        kubectl("apply", "-k", str(overlay or self.overlay()))
        self.cluster.apply(policy(NAMESPACE, TENANTS, identities=[IDENTITY]))
        self.wait_pool()
        assert self.load(1) == {"ok": 1}
        return time.monotonic() - began

    def wait_client(self) -> None:
        """Returns once the tenant's Pod can be told what to run."""
        ready = [f"pod/{CLIENT}", "-n", TENANTS, "--for=condition=Ready", "--timeout=180s"]
        self.cluster.kubectl("wait", *ready, timeout=200)

    def wait_pool(self) -> None:
        """Returns once the pool is ready."""
        self.kubectl("wait", "enginepool/default", "--for=condition=Ready", "--timeout=600s", timeout=620)

    def uninstall(self, overlay: Path | None = None) -> None:
        """Deletes what was installed, what it serves with it."""
        kubectl = self.cluster.kubectl
        self.kubectl("delete", "deployments", "--all", "--cascade=foreground", "--timeout=180s", timeout=200)
        kubectl("delete", "-k", str(overlay or self.overlay()), "--ignore-not-found", "--timeout=180s", timeout=200)
        kubectl("delete", "-k", f"{REPOSITORY}/crds", "--timeout=180s", timeout=200)

    def overlay(self) -> Path:
        """The dev overlay with two small engines."""
        container = "/spec/template/spec/containers/0"
        patch: list[Object] = [{"op": "add", "path": f"{container}/args/-", "value": each} for each in SIZES]
        patch.append({"op": "replace", "path": f"{container}/resources/requests", "value": REQUESTS})
        kustomization = {
            "resources": ["overlays/dev"],
            "replicas": [{"name": "evenhand-engine", "count": 2}],
            "patches": [{"target": {"kind": "Deployment", "name": "evenhand-engine"}, "patch": yaml.safe_dump(patch)}],
        }
        return self.write_overlay("overlay", kustomization)

    def write_overlay(self, name: str, kustomization: Object, *own: Object) -> Path:
        """A folder of kustomize's: folders of manifests/ are named as they are there; `own` are objects of its own."""
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        paths = {
            kind: [
                os.path.relpath(REPOSITORY / "manifests" / each, directory.resolve()) for each in kustomization[kind]
            ]
            for kind in ("resources", "components")
            if kind in kustomization
        }
        if own:
            (directory / "own.yaml").write_text(yaml.safe_dump_all(own))
            paths["resources"].append("own.yaml")
        (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization | paths))
        return directory

    def load(
        self, requests: int, at_once: int = 1, per_second: float = 1000, *, goes_on: bool = False
    ) -> dict[str, int]:
        """What came of requests that the tenant's Pod sent to the Service; `goes_on`: of more, until it is told to stop."""
        arguments = [str(at_once), str(per_second), str(requests), "1" if goes_on else "0"]
        command = ["exec", "-i", CLIENT, "-n", TENANTS, "--", "python", "-", *arguments]
        program = Path(cluster_client.__file__).read_text()
        outcomes: dict[str, int] = json.loads(self.cluster.kubectl(*command, stdin=program, timeout=1200))
        return outcomes

    @contextlib.contextmanager
    def under_load(self, at_once: int, per_second: float, at_least: int = 1) -> Iterator[dict[str, int]]:
        """The tenant's Pod sends requests for as long as the block takes, and so many; what came of them is there then."""
        outcomes: dict[str, int] = {}
        in_client = ["exec", CLIENT, "-n", TENANTS, "--"]
        self.cluster.kubectl(*in_client, "rm", "-f", cluster_client.STOP)
        with concurrent.futures.ThreadPoolExecutor(1) as background:
            load = background.submit(self.load, at_least, at_once, per_second, goes_on=True)
            try:
                yield outcomes
            finally:
                self.cluster.kubectl(*in_client, "touch", cluster_client.STOP)
            outcomes |= load.result()

    def roll_out(self, deployment: str = ENGINES) -> None:
        """Returns once the Deployment is rolled out."""
        namespace = OPERATOR_NAMESPACE if deployment == OPERATOR else NAMESPACE
        self.cluster.kubectl("rollout", "status", deployment, "-n", namespace, "--timeout=600s", timeout=620)

    def api_server(self) -> str:
        """ADDRESS:PORT of one, as the Service `kubernetes` leads to it."""
        [found, *_] = self.cluster.find("endpointslices", "default", "kubernetes.io/service-name=kubernetes")
        return f"{found['endpoints'][0]['addresses'][0]}:{found['ports'][0]['port']}"

    def pods(self) -> list[Object]:
        """Of operator and engines."""
        return [each for namespace in (OPERATOR_NAMESPACE, NAMESPACE) for each in self.cluster.find("pods", namespace)]

    def restarts(self) -> int:
        """How often a container of operator and engines ended."""
        return sum(status["restartCount"] for pod in self.pods() for status in pod["status"]["containerStatuses"])


def client() -> list[Object]:
    """A ServiceAccount and its Pod, which waits to be told what to run."""
    metadata = {"namespace": TENANTS, "name": CLIENT}
    token = {"path": "token", "audience": "evenhand/inference/default", "expirationSeconds": 3600}
    container = {
        "name": CLIENT,
        "image": "evenhand.dev/operator:dev",
        "command": ["sleep", "infinity"],
        "volumeMounts": [{"name": "token", "mountPath": str(Path(cluster_client.TOKEN).parent)}],
    }
    spec = {
        "serviceAccountName": CLIENT,
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [{"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}}],
    }
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec},
    ]
