"""What the operator needs of Kubernetes objects, parsed from what the API server sends; everything else is dropped."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

ObjectKey = tuple[str, str]
"""Namespace and name."""
Json = dict[str, Any]

ADMIN_PORT_NAME = "admin"
DEFAULT_ADMIN_PORT = 9000


class Meta(msgspec.Struct, frozen=True, rename="camel"):
    """Metadata of any object."""

    name: str
    uid: str
    resource_version: str
    namespace: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    deletion_timestamp: str | None = None

    @property
    def key(self) -> ObjectKey:
        """Namespace and name."""
        return self.namespace, self.name

    @property
    def version(self) -> int:
        """Resource version, by which two states of an object are ordered (KEP-5504)."""
        return int(self.resource_version)


def read_meta(obj: Mapping[str, Any]) -> Meta:
    """Metadata of an object as the API server sends it."""
    return msgspec.convert(obj["metadata"], Meta)


class EnginePod(msgspec.Struct, frozen=True, kw_only=True):
    """A pod as the operator sees it.

    Attributes:
        key: namespace and name.
        uid: of the pod.
        labels: of the pod.
        url: of the admin port; empty while the pod has no address.
        instance: identity of the running container; another one after every restart.
        started_at: Unix time at which that container started.
        ready_since: Unix time since which the pod is ready; None while it is not, or is being deleted.
        is_running: whether there is a process that can be pushed to, be it that it is not ready before it was.
    """

    key: ObjectKey
    uid: str
    labels: dict[str, str]
    url: str
    instance: str
    started_at: float
    ready_since: float | None
    is_running: bool = True

    @property
    def name(self) -> str:
        """Name of the pod."""
        return self.key[1]


class _Port(msgspec.Struct, rename="camel"):
    container_port: int
    name: str = ""


class _ContainerSpec(msgspec.Struct):
    name: str = ""
    ports: list[_Port] = []


class _PodSpec(msgspec.Struct, rename="camel"):
    containers: list[_ContainerSpec] = []
    init_containers: list[_ContainerSpec] = []  # native sidecars are among them


class _Running(msgspec.Struct, rename="camel"):
    started_at: str | None = None


class _State(msgspec.Struct):
    running: _Running | None = None


class _ContainerStatus(msgspec.Struct, rename="camel"):
    name: str = ""
    restart_count: int = 0
    state: _State = msgspec.field(default_factory=_State)


class _PodCondition(msgspec.Struct, rename="camel"):
    type: str
    status: str
    last_transition_time: str | None = None


class _PodStatus(msgspec.Struct, rename="camel"):
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: list[_PodCondition] = []
    container_statuses: list[_ContainerStatus] = []
    init_container_statuses: list[_ContainerStatus] = []


class _Pod(msgspec.Struct):
    metadata: Meta
    spec: _PodSpec
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


def read_pod(obj: Mapping[str, Any]) -> EnginePod:
    """A pod as the API server sends it."""
    pod = msgspec.convert(obj, _Pod)
    container, port = _admin_container(pod.spec)
    statuses = [*pod.status.container_statuses, *pod.status.init_container_statuses]
    status = next((each for each in statuses if each.name == container), _ContainerStatus())
    started = status.state.running.started_at if status.state.running else None
    ready = next((each for each in pod.status.conditions if each.type == "Ready"), None)
    is_ready = ready is not None and ready.status == "True" and pod.metadata.deletion_timestamp is None
    address = f"[{pod.status.pod_ip}]" if ":" in pod.status.pod_ip else pod.status.pod_ip
    return EnginePod(
        key=pod.metadata.key,
        uid=pod.metadata.uid,
        labels=pod.metadata.labels,
        url=f"http://{address}:{port}" if address else "",
        instance=f"{pod.metadata.uid}/{status.restart_count}/{started or ''}",
        started_at=read_time(started),
        ready_since=read_time(ready.last_transition_time) if ready is not None and is_ready and address else None,
        is_running=bool(address) and (is_ready or status.state.running is not None),
    )


def _admin_container(spec: _PodSpec) -> tuple[str, int]:
    """Name of the container with the admin port, and the port; the first container where none names it."""
    for container in [*spec.containers, *spec.init_containers]:
        for port in container.ports:
            if port.name == ADMIN_PORT_NAME:
                return container.name, port.container_port
    return (spec.containers[0].name if spec.containers else ""), DEFAULT_ADMIN_PORT


def read_time(text: str | None) -> float:
    """Unix time of a timestamp of the API; 0 where there is none that can be read."""
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:  # the API server lets the year 0 pass
        return 0.0


def write_time(seconds: float) -> str:
    """A Unix time as metav1.Time writes it: whole seconds, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
