"""A pool with running engines and a running operator, and what tests ask of them."""

import json
import time
from collections.abc import Callable
from typing import Any

from cluster.client import Cluster, KubectlError
from evenhand_policy.bootstrap import BootstrapError
from harness.objects import ADMIN_PORT, ENGINE_LABELS, policy
from harness.operator_process import read_json

Object = dict[str, Any]

PATIENCE = 120.0
"""Seconds for what takes one: how fast a machine that others use too does something is not what is tested."""


class Stage:
    """One namespace in which a pool `default` is served. `config_path` is where its engines show what they enforce."""

    def __init__(self, cluster: Cluster, namespace: str, config_path: str = "/config") -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._config_path = config_path

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """kubectl in the namespace."""
        return self.cluster.kubectl(*arguments, "-n", self.namespace, **options)

    def apply(self, name: str, **spec: object) -> None:
        """`kubectl apply` of a TenantPolicy."""
        self.cluster.apply(policy(self.namespace, name, **spec))

    def kstatus(self, obj: Object) -> str:
        """What Flux would say of an object."""
        return str(self.cluster.kstatus([obj])[0]["status"])

    def policy(self, name: str) -> Object:
        """A TenantPolicy as it is stored."""
        return self.cluster.get("tenantpolicies.evenhand.dev", name, self.namespace)

    def pool(self, name: str = "default") -> Object:
        """An EnginePool as it is stored."""
        return self.cluster.get("enginepools.evenhand.dev", name, self.namespace)

    def rows(self) -> dict[str, Object]:
        """What the pool's status says of each pod."""
        return {row["name"]: row for row in self.pool().get("status", {}).get("pods", [])}

    def ready_pods(self) -> list[Object]:
        """Engine pods that are ready."""
        selector = ",".join(f"{key}={value}" for key, value in ENGINE_LABELS.items())
        pods = self.cluster.find("pods", self.namespace, selector)
        return [pod for pod in pods if is_ready(pod)]

    def wait_serving(self, count: int) -> None:
        """Returns once so many engines are ready, and enforce what they should."""
        until(lambda: len(self.ready_pods()) == count and self.pool()["status"]["applied"] == f"{count}/{count}")

    def documents(self) -> list[Object]:
        """What each ready pod enforces, by its own word: source, numReplicas, config."""
        return [
            read_json(f"http://{pod['status']['podIP']}:{ADMIN_PORT}{self._config_path}") for pod in self.ready_pods()
        ]

    def tenants(self) -> list[dict[str, Object]]:
        """Tenants by name that each ready pod enforces."""
        return [{each["tenantId"]: each for each in one["config"]["tenants"]} for one in self.documents()]

    def enforced(self, tenant: str, field: str) -> list[Any]:
        """One field of one tenant as each ready pod enforces it; None where a pod does not know the tenant."""
        return [each.get(tenant, {}).get(field) for each in self.tenants()]

    def wait_ready(self, *names: str, timeout: float = PATIENCE) -> None:
        """Returns once the policies are Ready in the generation that they have now, as a pipeline would wait."""
        self.wait("Ready", *names, timeout=timeout)

    def wait(self, condition: str, *names: str, timeout: float = PATIENCE) -> None:
        """`kubectl wait` for a condition, such as `Accepted=false`."""
        resources = [f"tpol/{name}" for name in names]
        self.kubectl(
            "wait", f"--for=condition={condition}", f"--timeout={timeout:.0f}s", *resources, timeout=2 * timeout
        )

    def wait_refused(self, name: str, reason: str) -> None:
        """Returns once the policy, in the generation that it has now, is not accepted for this reason: until all that was
        changed before is seen, it may be another."""

        def is_refused() -> bool:
            obj = self.policy(name)
            is_observed = obj["status"]["observedGeneration"] == obj["metadata"]["generation"]
            return is_observed and conditions(obj)["Accepted"] == ("False", reason)

        until(is_refused)

    def wait_enforced(self, tenant: str, field: str, expected: list[Any]) -> None:
        """Returns once the ready pods are as many, and enforce this."""
        until(lambda: self.enforced(tenant, field) == expected)

    def conditions(self, name: str) -> dict[str, tuple[str, str]]:
        """Status and reason by type."""
        return conditions(self.policy(name))

    def events(self, name: str) -> list[tuple[str, str]]:
        """Type and reason of the Events about an object, in the order in which they came."""
        answer = self.kubectl("get", "events", "--field-selector", f"involvedObject.name={name}", "-o", "json")
        items = json.loads(answer)["items"]
        items.sort(key=lambda event: int(event["metadata"]["resourceVersion"]))
        return [(event["type"], event["reason"]) for event in items]


def conditions(obj: Object) -> dict[str, tuple[str, str]]:
    """Status and reason by type."""
    return {each["type"]: (each["status"], each["reason"]) for each in obj.get("status", {}).get("conditions", [])}


def is_ready(pod: Object) -> bool:
    """Whether a pod is in service."""
    rows = pod.get("status", {}).get("conditions", [])
    return "deletionTimestamp" not in pod["metadata"] and any(
        row["type"] == "Ready" and row["status"] == "True" for row in rows
    )


def until(holds: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Returns once it holds; while it raises what a moment explains, it does not."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            if holds():
                return
            failure: Exception | None = None
        except (OSError, KeyError, StopIteration, KubectlError, BootstrapError) as error:
            failure = error
        if time.monotonic() > deadline:
            raise AssertionError(f"never came to hold within {timeout} s") from failure
        time.sleep(0.1)


def until_still(read: Callable[[], object], seconds: float) -> None:
    """Returns once it reads the same before and after so many seconds."""

    def is_still() -> bool:
        before = read()
        time.sleep(seconds)
        return read() == before

    until(is_still)
