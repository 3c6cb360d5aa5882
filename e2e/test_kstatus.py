"""What Flux and other users of kstatus are told at every point of a policy's life, by the library that they use.

A pipeline must neither go on before a policy is in force, nor wait for what cannot come by itself.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cluster.control_plane import ControlPlane
from cluster.pod_runner import PodRunner
from harness.fixtures import Operators
from harness.objects import api_key, light_engines, policy, pool, secret
from harness.operator_process import OperatorProcess
from harness.stage import Stage, until


class Scene(Stage):
    """Two light engines, their pool and an operator, in which the policy `subject` is brought to a point of its life."""

    def __init__(self, cluster: ControlPlane, namespace: str, operator: OperatorProcess, pods: PodRunner) -> None:
        super().__init__(cluster, namespace)
        self._operator = operator
        self._pods = pods
        self._afterwards = ExitStack()

    def apply(self, name: str = "subject", **spec: object) -> None:
        self.cluster.apply(policy(self.namespace, name, **spec))

    def stop_operator(self) -> None:
        """Nobody sees what happens from now on; what has happened is told."""
        until(lambda: self.judged()["default"] == "Current")
        self._operator.stop()
        self._afterwards.callback(self._operator.start)

    def lose_a_pod(self) -> None:
        process = self._pods.program(min(self.rows())).pid
        os.kill(process, signal.SIGSTOP)
        self._afterwards.callback(os.kill, process, signal.SIGCONT)

    def scale(self, replicas: int) -> None:
        self.kubectl("scale", "deployment", "engines", f"--replicas={replicas}")
        until(lambda: self.pool()["status"]["applied"] == f"{replicas}/{replicas}")

    def keep(self, finalizer: str | None) -> None:
        """Somebody else's finalizer on the subject holds up its deletion, or no longer does."""
        patch = json.dumps({"metadata": {"finalizers": finalizer and [finalizer]}})
        self.kubectl("patch", "tpol", "subject", "--type=merge", "-p", patch)

    def keep_while_deleted(self) -> None:
        self.keep("example.org/keep")
        self._afterwards.callback(self.keep, None)
        self.kubectl("delete", "tpol", "subject", "--wait=false")

    def judged(self) -> dict[str, str]:
        """Status of each policy and pool, by name, as kstatus sees it."""
        objects = [
            each
            for kind in ("tenantpolicies.evenhand.dev", "enginepools.evenhand.dev")
            for each in self.cluster.find(kind, self.namespace)
        ]
        return {each["name"]: each["status"] for each in self.cluster.kstatus(objects)}

    def clear(self) -> None:
        """As it was before."""
        self._afterwards.close()
        self.kubectl("delete", "tpol", "--all")
        self.cluster.apply(pool(self.namespace, paused=False))
        self.scale(2)


@pytest.fixture(scope="module")
def empty_scene(cluster: ControlPlane, served_namespace: str, operators: Operators) -> Iterator[Scene]:
    with PodRunner(cluster, served_namespace) as pods:
        cluster.apply(
            pool(served_namespace),
            light_engines(served_namespace, 2),
            secret(served_namespace, "weak-keys", one="guessable"),
        )
        scene = Scene(cluster, served_namespace, operators.start(served_namespace), pods)
        scene.scale(2)
        yield scene


@pytest.fixture
def scene(empty_scene: Scene) -> Iterator[Scene]:
    yield empty_scene
    empty_scene.clear()


# ---- how a policy comes to each point


def created_and_not_yet_seen(scene: Scene) -> None:
    scene.stop_operator()
    scene.apply()


def enforced(scene: Scene) -> None:
    scene.apply()
    scene.wait_ready("subject")


def edited_and_not_yet_seen(scene: Scene) -> None:
    enforced(scene)
    scene.stop_operator()
    scene.apply(weight=2)


def edited_and_enforced(scene: Scene) -> None:
    enforced(scene)
    scene.apply(weight=2)
    scene.wait_ready("subject")


def refused(scene: Scene) -> None:
    scene.apply(identities=[api_key("weak-keys")])
    scene.wait("Accepted=false", "subject")


def edited_into_a_refusal(scene: Scene) -> None:
    enforced(scene)
    refused(scene)


def refused_and_cured(scene: Scene) -> None:
    refused(scene)
    enforced(scene)


def refused_and_cured_but_not_yet_seen(scene: Scene) -> None:
    refused(scene)
    scene.stop_operator()
    scene.apply(identities=[])


def waiting_for_a_secret(scene: Scene) -> None:
    scene.apply(identities=[api_key("not-yet-there")])
    scene.wait("Accepted=false", "subject")


def in_conflict(scene: Scene) -> None:
    scene.apply("elder", tenant="seat")
    scene.wait_ready("elder")
    scene.apply(tenant="seat")
    scene.wait("Accepted=false", "subject")


def edited_while_a_pod_is_unreachable(scene: Scene) -> None:
    enforced(scene)
    scene.lose_a_pod()
    scene.apply(weight=2)
    until(lambda: scene.conditions("subject")["Programmed"] == ("False", "PartiallyProgrammed"))


def in_a_pool_without_pods(scene: Scene) -> None:
    scene.scale(0)
    enforced(scene)


def in_a_pool_that_is_missing(scene: Scene) -> None:
    enforced(scene)
    scene.kubectl("delete", "epool", "default")
    scene.wait("Accepted=false", "subject")


def in_a_pool_that_is_paused(scene: Scene) -> None:
    scene.cluster.apply(pool(scene.namespace, paused=True))
    scene.apply()
    until(lambda: scene.conditions("subject")["Programmed"] == ("False", "Paused"))


def being_deleted(scene: Scene) -> None:
    enforced(scene)
    scene.keep_while_deleted()


LIFE: dict[Callable[[Scene], None], dict[str, str]] = {
    created_and_not_yet_seen: {"subject": "InProgress", "default": "Current"},
    enforced: {"subject": "Current", "default": "Current"},
    edited_and_not_yet_seen: {"subject": "InProgress", "default": "Current"},
    edited_and_enforced: {"subject": "Current", "default": "Current"},
    refused: {"subject": "Failed", "default": "Current"},
    edited_into_a_refusal: {"subject": "Failed", "default": "Current"},
    refused_and_cured: {"subject": "Current", "default": "Current"},
    refused_and_cured_but_not_yet_seen: {"subject": "InProgress", "default": "Current"},
    waiting_for_a_secret: {"subject": "InProgress", "default": "Current"},
    in_conflict: {"subject": "Failed", "elder": "Current", "default": "Current"},
    edited_while_a_pod_is_unreachable: {"subject": "InProgress", "default": "InProgress"},
    in_a_pool_without_pods: {"subject": "Current", "default": "InProgress"},
    in_a_pool_that_is_missing: {"subject": "InProgress"},
    in_a_pool_that_is_paused: {"subject": "InProgress", "default": "InProgress"},
    being_deleted: {"subject": "Terminating", "default": "Current"},
}


@pytest.mark.parametrize("come_to_point", LIFE, ids=lambda point: point.__name__)
def test_pipelines_are_told_the_truth(scene: Scene, come_to_point: Callable[[Scene], None]) -> None:
    come_to_point(scene)
    until(lambda: scene.judged() == LIFE[come_to_point])  # the pool's own status may come a moment later
