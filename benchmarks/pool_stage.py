"""What the operator's benchmarks share: a real control plane, the operator with its own rights, engine pods, policies."""

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster import build
from cluster.api_client import ApiClient, ApiError
from cluster.control_plane import ControlPlane
from cluster.fixtures import install_crds
from evenhand_policy.secret import API_KEYS_TYPE
from harness.crowd import Crowd
from harness.fixtures import install_operator_rights
from harness.objects import api_key, policy, pool, secret
from harness.operator_process import OperatorProcess

Object = dict[str, Any]

NAMESPACE, STRANGERS = "inference", "strangers"
ALL_NAMESPACES = build.SOURCES.parents[1] / "manifests/components/all-namespaces/rbac.yaml"
_POLICIES = f"/apis/evenhand.dev/v1alpha1/namespaces/{NAMESPACE}/tenantpolicies"
_SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets"
_IN_FLIGHT = 24


class PoolStage:
    """A pool with its engine pods, and an operator that is for the benchmark to start."""

    def __init__(self, client: ApiClient, crowd: Crowd, operator: OperatorProcess) -> None:
        self.client = client
        self.crowd = crowd
        self.operator = operator

    async def create_policies(self, indices: Iterable[int]) -> None:
        """`team-INDEX`, each with a limit and an API key in a Secret of its own."""

        async def create(index: int) -> None:
            name = f"team-{index}"
            key = secret(NAMESPACE, f"{name}-keys", key=f"a-key-that-nobody-can-guess-{index:05}")
            key["type"] = API_KEYS_TYPE
            await self.client.call("POST", _SECRETS, key)
            limits = {"requestsPerMinute": 600, "maxConcurrentRequests": 32}
            spec = {"weight": 1, "limits": limits, "identities": [api_key(f"{name}-keys")]}
            await self.client.call("POST", _POLICIES, policy(NAMESPACE, name, **spec))

        await _at_once(create, indices)

    async def create_strangers(self, number: int) -> None:
        """Pods and Secrets of others, in a namespace of their own."""
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": STRANGERS}}
        await self.client.call("POST", "/api/v1/namespaces", namespace)
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
        with contextlib.suppress(ApiError):  # a controller makes it too
            await self.client.call("POST", f"/api/v1/namespaces/{STRANGERS}/serviceaccounts", account)
        spec = {"containers": [{"name": "main", "image": "stranger"}]}

        async def create(index: int) -> None:
            name = f"stranger-{index}"
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
            await self.client.call("POST", f"/api/v1/namespaces/{STRANGERS}/pods", pod)
            await self.client.call(
                "POST", f"/api/v1/namespaces/{STRANGERS}/secrets", secret(STRANGERS, name, text="x" * 1000)
            )

        await _at_once(create, range(number))

    async def set_weight(self, name: str, weight: int) -> Object:
        """Change a policy; returns it as it was stored."""
        body = {"spec": {"weight": weight}}
        return await self.client.call("PATCH", f"{_POLICIES}/{name}", body, "application/merge-patch+json")

    async def set_weights(self, weights: dict[str, int]) -> dict[str, int]:
        """Change many policies, some at a time, as a pipeline that applies a commit; returns the generation of each."""
        generations: dict[str, int] = {}

        async def change(name: str) -> None:
            generations[name] = (await self.set_weight(name, weights[name]))["metadata"]["generation"]

        await _at_once(change, weights)
        return generations

    async def delete_policies(self, names: Iterable[str]) -> None:
        """Delete some."""
        await _at_once(lambda name: self.client.call("DELETE", f"{_POLICIES}/{name}"), names)

    async def policies(self) -> dict[str, Object]:
        """All of them by name, as they are stored."""
        found: dict[str, Object] = {}
        page = ""
        while True:
            listing = await self.client.call("GET", f"{_POLICIES}?limit=500&continue={page}")
            found |= {each["metadata"]["name"]: each for each in listing["items"]}
            page = listing["metadata"].get("continue", "")
            if not page:
                return found

    @contextlib.asynccontextmanager
    async def watching_until_right(self, names: Iterable[str], weight: int) -> AsyncIterator[asyncio.Future[float]]:
        """Follows all policies by a watch, which costs the API server next to nothing, while it is entered; yields what
        will be the time, by `time.monotonic()`, at which those of `names` have that weight and a right status."""
        found = asyncio.get_running_loop().create_future()
        listed = asyncio.Event()
        stored = await self.policies()
        uids = [stored[name]["metadata"]["uid"] for name in names]

        def look(policies: dict[str, Object]) -> None:
            listed.set()
            changed = (policies[uid] for uid in uids)
            if not found.done() and all(each["spec"]["weight"] == weight and is_right(each) for each in changed):
                found.set_result(time.monotonic())

        following = asyncio.create_task(self.client.follow(_POLICIES, look))
        await listed.wait()
        try:
            yield found
        finally:
            following.cancel()

    async def until_right(self, timeout: float = 120) -> None:
        """Returns when the status of every policy is right. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while not all(map(is_right, (await self.policies()).values())):
                await asyncio.sleep(0.5)


def processor_seconds(pids: Iterable[int]) -> float:
    """That these processes have taken until now."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(each.user + each.system for each in times))


def is_right(policy: Object) -> bool:
    """Whether its status says that every engine enforces it as it is now."""
    status = policy.get("status", {})
    ready = (each["status"] for each in status.get("conditions", []) if each["type"] == "Ready")
    return status.get("observedGeneration") == policy["metadata"]["generation"] and next(ready, "") == "True"


async def _at_once(do: Callable[[Any], Awaitable[object]], items: Iterable[Any]) -> None:
    slots = asyncio.Semaphore(_IN_FLIGHT)

    async def run(item: Any) -> None:
        async with slots:
            await do(item)

    async with asyncio.TaskGroup() as tasks:
        for item in items:
            tasks.create_task(run(item))


@contextlib.asynccontextmanager
async def pool_stage(
    num_pods: int, num_processes: int, *, num_spares: int = 0, cluster_wide: bool = False
) -> AsyncIterator[PoolStage]:
    """Everything but the policies; the operator, of one namespace or `cluster_wide`, is not started. Exits where the
    control plane is not built."""
    if missing := build.missing_programs():
        sys.exit(f"no control plane: {', '.join(missing)} not built (make cluster)")
    with (
        tempfile.TemporaryDirectory(prefix="evenhand-bench-", ignore_cleanup_errors=True) as name,
        ControlPlane(build.programs(), Path(name)) as cluster,
    ):
        folder = Path(name) / "crowd"
        with Crowd(cluster, NAMESPACE, num_pods, num_processes, folder, num_spares) as crowd:
            namespaces = [] if cluster_wide else [NAMESPACE]
            options = ["--pod-selector=evenhand.dev/pool"] if cluster_wide else []
            kubeconfig = _install(cluster)
            if cluster_wide:
                cluster.apply(*yaml.safe_load_all(ALL_NAMESPACES.read_text()))
            operator = OperatorProcess(cluster, kubeconfig, folder / "operator.log", namespaces, *options)
            async with cluster.api_client() as client:
                await crowd.join(client)
                try:
                    yield PoolStage(client, crowd, operator)
                finally:
                    operator.stop()


def _install(cluster: ControlPlane) -> Path:
    """CRDs, the operator's rights and the pool; returns the operator's kubeconfig."""
    install_crds(cluster)
    kubeconfig = install_operator_rights(cluster)
    cluster.create_namespace(NAMESPACE)  # the manifests have it too, but do not wait for its ServiceAccount
    cluster.apply(pool(NAMESPACE))
    return kubeconfig
