"""Objects as the API server sends them: the smallest sound one of each kind, with what a test adds."""

import base64
from typing import Any

Json = dict[str, Any]

NAMESPACE = "inference"
CREATED = "2026-01-01T00:00:00Z"
ENGINE = {"app": "engine"}


def make_meta(name: str, namespace: str | None = NAMESPACE, version: int = 1, **more: Any) -> Json:
    """Metadata. `deleted`: it is on its way, held by a finalizer."""
    if more.pop("deleted", False):
        more |= {"deletionTimestamp": CREATED, "finalizers": ["tests/held"]}
    where = {} if namespace is None else {"namespace": namespace}
    sound = {"uid": f"uid-{name}", "resourceVersion": str(version), "generation": 1, "creationTimestamp": CREATED}
    return {"name": name} | where | sound | more


def make_policy(name: str = "chat", *, meta: Json | None = None, status: Json | None = None, **spec: Any) -> Json:
    """A TenantPolicy; `meta` are arguments of `make_meta`."""
    return _resource("TenantPolicy", make_meta(name, **(meta or {})), spec, status)


def make_pool(name: str = "default", *, meta: Json | None = None, status: Json | None = None, **spec: Any) -> Json:
    """An EnginePool of the pods with the labels `ENGINE`."""
    return _resource(
        "EnginePool", make_meta(name, **(meta or {})), {"selector": {"matchLabels": ENGINE}} | spec, status
    )


def _resource(kind: str, metadata: Json, spec: Json, status: Json | None) -> Json:
    obj = {"apiVersion": "evenhand.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}
    return obj if status is None else obj | {"status": status}


def make_secret(name: str, *values: str, type: str = "Opaque", **meta: Any) -> Json:  # noqa: A002
    """A Secret with these values, as an item of a list, which lacks its kind."""
    data = {f"k{index}": base64.b64encode(value.encode()).decode() for index, value in enumerate(values)}
    return {"metadata": make_meta(name, **meta), "data": data, "type": type}


def make_namespace(name: str, version: int = 1, **labels: str) -> Json:
    """A Namespace with these labels besides its name."""
    return {"metadata": make_meta(name, None, version, labels={"kubernetes.io/metadata.name": name} | labels)}


def make_pod(
    name: str = "pod-0", url: str = "http://127.1.2.3:9100", *, ready: bool = True, restarts: int = 0, **meta: Any
) -> Json:
    """An engine pod whose admin port is at `url`."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-01-01T00:00:09Z"}
    running = {"running": {"startedAt": f"2026-01-01T00:00:0{restarts}Z"}}
    return {
        "metadata": make_meta(name, **{"labels": ENGINE} | meta),
        "spec": {
            "containers": [
                {"name": "sidecar", "ports": [{"containerPort": 1}]},
                {"name": "engine", "ports": [{"name": "admin", "containerPort": int(port)}]},
            ]
        },
        "status": {
            "phase": "Running",
            "podIP": host.strip("[]"),
            "conditions": [condition],
            "containerStatuses": [
                {"name": "sidecar", "restartCount": 7, "state": {}},
                {"name": "engine", "restartCount": restarts, "state": running},
            ],
        },
    }


class Notices:
    """Records what a Cache tells."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def documents_changed(self) -> None:
        """What decides about documents is another."""
        self.told.append("documents")

    def pods_changed(self) -> None:
        """Which pods are ready is another."""
        self.told.append("pods")

    def statuses_changed(self) -> None:
        """A status is another."""
        self.told.append("statuses")

    def gap_seen(self) -> None:
        """Events may be missing."""
        self.told.append("gap")

    def take(self) -> list[str]:
        """What was told since the last time."""
        told, self.told = self.told, []
        return told
