"""Acts as scheduler and kubelet for the Pods of one namespace, where no node runs.

Pods of real Deployments are bound, their command is started as a process on a loopback address of its own, their status
says what is so, and their deletion is finished. A real node makes it superfluous: a test that looks only at Pods, at what
they answer and at the API does not notice the difference.
"""

import asyncio
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from cluster.api_client import UNREACHABLE, ApiClient, ApiError
from cluster.container import Container, now
from cluster.control_plane import ControlPlane
from cluster.programs import Program
from cluster.sandbox import Launch, Object, Sandbox
from cluster.volumes import SecretMissing, token_audiences, write_volumes

NODE = "test-node"
TICK = 0.05
"""Seconds between two looks at everything."""


@dataclass
class _Keeper:
    """What is known of a Pod beyond its object: its container once it has one, the Secrets that its volumes show, and the
    status written last."""

    sandbox: Sandbox
    container: Container | None = None
    mounted: Mapping[str, Object] | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    waiting_for: str = ""
    began: str = field(default_factory=now)
    ready: bool = False
    ready_changed: str = field(default_factory=now)
    written: Object | None = None


class PodRunner:
    """Runs the Pods of `namespace` while it is entered; `launch` may tell another way to start each than its own command.

    A Pod is one process, that of its first container, restarted whenever it ends. Of probes only readiness by httpGet is
    run, and no lifecycle hook. Volumes follow their Secrets within a moment. Everything happens in a thread of its own,
    so that it serves tests with and without an event loop.
    """

    def __init__(
        self, cluster: ControlPlane, namespace: str, launch: Callable[[Sandbox], Launch] = Sandbox.own_command
    ) -> None:
        self._cluster = cluster
        self._path = f"/api/v1/namespaces/{namespace}"
        self._directory = cluster.directory / f"pods-{namespace}"
        self._launch = launch
        self._addresses = loopback_addresses()
        self._pods: dict[str, Object] = {}
        self._secrets: dict[str, Object] = {}
        self._keepers: dict[str, _Keeper] = {}
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run_thread, name=f"pods of {namespace}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends every process; the Pods stay in the API as they are. Raises what the runner itself failed with."""
        self._stopping.set()
        self._thread.join()
        if self._failure:
            raise self._failure

    def program(self, pod_name: str) -> Program:
        """The process of a Pod that has been started: its log, and its pid to send signals to. Raises KeyError."""
        for keeper in list(self._keepers.values()):
            if keeper.container and keeper.sandbox.pod["metadata"]["name"] == pod_name:
                return keeper.container.program
        raise KeyError(f"no process for pod {pod_name}")

    def _run_thread(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as failure:
            self._failure = failure

    async def _run(self) -> None:
        async with self._cluster.api_client() as client, asyncio.TaskGroup() as tasks:
            followers = [
                tasks.create_task(client.follow(f"{self._path}/pods", self._replace_pods)),
                tasks.create_task(client.follow(f"{self._path}/secrets", self._replace_secrets)),
            ]
            try:
                while not self._stopping.is_set():
                    await self._sync(client)
                    await asyncio.sleep(TICK)
            finally:
                for each in followers:
                    each.cancel()
                await self._stop_containers(list(self._keepers.values()))

    def _replace_pods(self, pods: dict[str, Object]) -> None:
        self._pods = pods

    def _replace_secrets(self, stored: dict[str, Object]) -> None:
        self._secrets = by_name(stored.values())

    async def _sync(self, client: ApiClient) -> None:
        gone = [self._keepers.pop(uid) for uid in self._keepers.keys() - self._pods.keys()]
        await self._stop_containers(gone)
        for uid, pod in list(self._pods.items()):
            if uid not in self._keepers:
                self._keepers[uid] = _Keeper(Sandbox(pod, next(self._addresses), self._directory / uid))
            try:
                await self._sync_pod(client, pod, self._keepers[uid])
            except UNREACHABLE:
                pass  # the next round tries again
            except ApiError as refused:
                if not refused.passes:
                    raise

    async def _sync_pod(self, client: ApiClient, pod: Object, keeper: _Keeper) -> None:
        path = f"{self._path}/pods/{pod['metadata']['name']}"
        if "deletionTimestamp" in pod["metadata"]:
            await self._finish_deletion(client, pod, keeper, path)
        elif "nodeName" not in pod["spec"]:
            target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
            body = {
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": pod["metadata"]["name"]},
                "target": target,
            }
            await client.call("POST", f"{path}/binding", body)
            return
        else:
            await self._keep_running(client, pod, keeper)
        status = self._status(keeper)
        if status != keeper.written:
            await client.call("PATCH", f"{path}/status", {"status": status}, "application/merge-patch+json")
            keeper.written = status

    async def _keep_running(self, client: ApiClient, pod: Object, keeper: _Keeper) -> None:
        sandbox = keeper.sandbox
        if keeper.mounted is not (followed := self._secrets):
            if keeper.container is None:  # what we follow may lag behind, and an optional Secret not be missed
                stored = by_name((await client.call("GET", f"{self._path}/secrets"))["items"])
            else:
                stored = followed
            for audience in token_audiences(pod) - keeper.tokens.keys():
                keeper.tokens[audience] = await request_token(client, pod, audience)
            try:
                write_volumes(pod, stored, keeper.tokens, sandbox.directory / "volumes")
                keeper.waiting_for = ""
            except SecretMissing as missing:  # one that is taken away later stays mounted
                keeper.waiting_for = str(missing)
            keeper.mounted = followed
        if keeper.container is None and not keeper.waiting_for:
            keeper.container = self._container(sandbox)
        if keeper.container:
            keeper.container.tick()

    def _container(self, sandbox: Sandbox) -> Container:
        spec = sandbox.container
        launch = self._launch(sandbox)
        sandbox.directory.mkdir(parents=True, exist_ok=True)
        log = sandbox.directory / f"{spec['name']}.log"
        name = f"{sandbox.pod['metadata']['name']}/{spec['name']}"
        return Container(spec, sandbox.address, self._cluster.program(name, launch.command, log, launch.environment))

    async def _finish_deletion(self, client: ApiClient, pod: Object, keeper: _Keeper, path: str) -> None:
        if keeper.container:
            keeper.container.stop(grace=pod["metadata"].get("deletionGracePeriodSeconds", 30))
            if not keeper.container.stopped:
                return
        uid = pod["metadata"]["uid"]
        await client.call("DELETE", path, {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})
        shutil.rmtree(keeper.sandbox.directory / "volumes", ignore_errors=True)
        self._pods.pop(uid, None)
        del self._keepers[uid]

    def _status(self, keeper: _Keeper) -> Object:
        container = keeper.container
        ready = bool(container and container.ready)
        if ready != keeper.ready:
            keeper.ready, keeper.ready_changed = ready, now()
        conditions = [
            condition("PodScheduled", True, keeper.began),
            condition("Initialized", True, keeper.began),
            condition("ContainersReady", ready, keeper.ready_changed),
            condition("Ready", ready, keeper.ready_changed),
        ]
        started = container is not None and container.started
        status: Object = {
            "phase": "Running" if started else "Pending",
            "startTime": keeper.began,
            "conditions": conditions,
        }
        if container is None:
            return status | {"message": keeper.waiting_for}
        address = keeper.sandbox.address
        return status | {
            "message": None,
            "hostIP": "127.0.0.1",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "containerStatuses": [container.status()],
        }

    async def _stop_containers(self, keepers: Sequence[_Keeper]) -> None:
        containers = [each.container for each in keepers if each.container]
        for each in containers:
            each.stop(grace=1)
        for each in containers:
            await each.wait_stopped()


async def request_token(client: ApiClient, pod: Object, audience: str) -> str:
    """A token of the Pod's ServiceAccount that is bound to the Pod, as a kubelet asks for it."""
    metadata, account = pod["metadata"], pod["spec"].get("serviceAccountName", "default")
    bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    spec = {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound}
    path = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/{account}/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    return str((await client.call("POST", path, body))["status"]["token"])


def by_name(objects: Iterable[Object]) -> dict[str, Object]:
    """Objects of one kind and namespace."""
    return {each["metadata"]["name"]: each for each in objects}


def condition(kind: str, status: bool, since: str) -> Object:
    """One condition of a Pod."""
    return {"type": kind, "status": str(status), "lastTransitionTime": since}


def loopback_addresses() -> Iterator[str]:
    """Addresses of this machine, each once. They begin at random, so that several runs may use the same port."""
    block = random.randrange(16 * 256, 200 * 256)
    while True:
        block += 1
        yield from (f"127.{block // 256}.{block % 256}.{last}" for last in range(1, 255))
