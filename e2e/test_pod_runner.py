"""Pods of real Deployments, run as processes of this machine."""

import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import tenacity

from cluster.control_plane import ControlPlane
from cluster.pod_runner import PodRunner
from cluster.sandbox import Launch, Sandbox

PORT = 8080
SERVE = """
import http.server, os, pathlib, signal, sys
address, volumes, stubborn = sys.argv[1:]
if stubborn == "yes":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = pathlib.Path(volumes + self.path)
        body = path.read_bytes() if path.is_file() else b""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
print("serving", flush=True)
http.server.HTTPServer((address, 8080), Handler).serve_forever()
"""
PROBE = {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 3}

Object = dict[str, Any]
eventually = tenacity.retry(stop=tenacity.stop_after_delay(120), wait=tenacity.wait_fixed(0.1), reraise=True)


def serve(sandbox: Sandbox) -> Launch:
    stubborn = sandbox.pod["metadata"]["labels"].get("stubborn", "no")
    return Launch([sys.executable, "-S", "-c", SERVE, sandbox.address, str(sandbox.directory / "volumes"), stubborn])


@pytest.fixture
def runner(cluster: ControlPlane, namespace: str) -> Iterator[PodRunner]:
    with PodRunner(cluster, namespace, serve) as runner:
        yield runner


@pytest.fixture
def deploy(cluster: ControlPlane, namespace: str) -> Callable[..., list[Object]]:
    """Applies a Deployment, waits until it is rolled out, and returns its Pods."""

    def deploy(replicas: int = 1, volumes: list[Object] | None = None, stubborn: str = "no") -> list[Object]:
        cluster.apply(deployment(namespace, replicas, volumes or [], stubborn))
        cluster.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=120s")
        return cluster.find("pods", namespace)

    return deploy


def deployment(namespace: str, replicas: int, volumes: list[Object], stubborn: str = "no") -> Object:
    labels = {"app": "web", "stubborn": stubborn}
    container = {
        "name": "web",
        "image": "web:test",
        "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": PROBE,
    }
    pod = {"terminationGracePeriodSeconds": 2, "containers": [container], "volumes": volumes}
    spec = {
        "replicas": replicas,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": namespace},
        "spec": spec,
    }


def secret(namespace: str, **data: str) -> Object:
    metadata = {"name": "keys", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}


def get(pod: Object, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://{pod['status']['podIP']}:{PORT}{path}", timeout=60) as response:
        return str(response.read().decode())


def is_ready(pod: Object) -> bool:
    return {"type": "Ready", "status": "True"}.items() <= {
        k: v for c in pod["status"]["conditions"] if c["type"] == "Ready" for k, v in c.items()
    }.items()


def test_deployment_becomes_available_with_an_address_for_each_pod(
    runner: PodRunner, deploy: Callable[..., list[Object]]
) -> None:
    first, second = deploy(replicas=2)
    assert first["status"]["podIP"] != second["status"]["podIP"]
    for pod in (first, second):
        assert get(pod) == ""
        [status] = pod["status"]["containerStatuses"]
        assert status["ready"] and status["restartCount"] == 0
        assert "serving" in runner.program(pod["metadata"]["name"]).log.read_text()


def test_crashed_process_is_started_again_at_the_same_address(
    cluster: ControlPlane, namespace: str, runner: PodRunner, deploy: Callable[..., list[Object]]
) -> None:
    [pod] = deploy()
    name = pod["metadata"]["name"]
    os.kill(runner.program(name).pid, signal.SIGKILL)
    cluster.kubectl(
        "wait",
        f"pod/{name}",
        "-n",
        namespace,
        "--for=jsonpath={.status.containerStatuses[0].restartCount}=1",
        "--timeout=120s",
    )
    cluster.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=condition=Ready", "--timeout=120s")
    again = cluster.get("pod", name, namespace)
    assert again["status"]["podIP"] == pod["status"]["podIP"]
    assert again["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 128 + signal.SIGKILL
    assert get(again) == ""


def test_pod_that_stops_answering_is_not_ready_until_it_answers(
    cluster: ControlPlane, namespace: str, runner: PodRunner, deploy: Callable[..., list[Object]]
) -> None:
    [pod] = deploy()
    name = pod["metadata"]["name"]
    os.kill(runner.program(name).pid, signal.SIGSTOP)
    cluster.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=condition=Ready=False", "--timeout=120s")
    os.kill(runner.program(name).pid, signal.SIGCONT)
    cluster.kubectl("wait", f"pod/{name}", "-n", namespace, "--for=condition=Ready", "--timeout=120s")
    assert cluster.get("pod", name, namespace)["status"]["containerStatuses"][0]["restartCount"] == 0


@pytest.mark.parametrize("stubborn", ["no", "yes"])
def test_deleted_pod_is_stopped_and_replaced(
    cluster: ControlPlane, namespace: str, runner: PodRunner, deploy: Callable[..., list[Object]], stubborn: str
) -> None:
    [pod] = deploy(stubborn=stubborn)
    name, pid = pod["metadata"]["name"], runner.program(pod["metadata"]["name"]).pid
    cluster.kubectl("delete", "pod", name, "-n", namespace, "--timeout=120s")  # waits until it is gone
    assert not psutil.pid_exists(pid)

    @eventually  # the Deployment's status may still be that of before
    def replaced() -> None:
        [successor] = cluster.find("pods", namespace)
        assert successor["metadata"]["uid"] != pod["metadata"]["uid"]
        assert get(successor) == ""

    replaced()


def test_volume_follows_its_secret(
    cluster: ControlPlane, namespace: str, runner: PodRunner, deploy: Callable[..., list[Object]]
) -> None:
    cluster.apply(secret(namespace, current="first"))
    [pod] = deploy(volumes=[{"name": "keys", "secret": {"secretName": "keys"}}])
    assert get(pod, "/keys/current") == "first"
    cluster.kubectl("delete", "secret", "keys", "-n", namespace)
    cluster.apply(secret(namespace, next="second"))

    @eventually
    def changed() -> None:
        assert (get(pod, "/keys/current"), get(pod, "/keys/next")) == ("", "second")

    changed()


def test_pods_own_command_finds_its_mounts_address_and_environment(cluster: ControlPlane, namespace: str) -> None:
    cluster.apply(secret(namespace, current="mounted"))
    volumes = [{"name": "keys", "secret": {"secretName": "keys", "optional": True}}, {"name": "tmp", "emptyDir": {}}]
    manifest = deployment(namespace, 1, volumes)
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    fields = [
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "KEYS", "value": "/etc/keys"},
    ]
    serve_here = 'echo "$POD_NAME" > "$KEYS/name"; cat "$KEYS/current" > "$KEYS/at-start"; exec "$@"'
    container |= {
        "command": ["sh", "-c", serve_here, "sh", sys.executable],
        "args": ["-m", "http.server", "--bind=0.0.0.0", "--directory=/etc/keys", str(PORT)],
        "env": fields,
        "volumeMounts": [
            {"name": "keys", "mountPath": "/etc/keys"},
            {"name": "tmp", "mountPath": str(cluster.directory)},
        ],
    }
    cluster.apply(manifest)
    with PodRunner(cluster, namespace):
        cluster.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=120s")
        [pod] = cluster.find("pods", namespace)
        assert get(pod, "/at-start") == "mounted"
        assert get(pod, "/name").strip() == pod["metadata"]["name"]


def test_optional_secret_may_be_missing(runner: PodRunner, deploy: Callable[..., list[Object]]) -> None:
    sources = [{"secret": {"name": "part-0", "optional": True}}, {"secret": {"name": "part-1", "optional": True}}]
    [pod] = deploy(volumes=[{"name": "parts", "projected": {"sources": sources}}])
    assert get(pod, "/parts/0") == ""


def test_pod_waits_for_a_secret_that_it_needs(cluster: ControlPlane, namespace: str, runner: PodRunner) -> None:
    cluster.apply(deployment(namespace, 1, [{"name": "keys", "secret": {"secretName": "keys"}}]))

    @eventually
    def waiting() -> None:
        [pod] = cluster.find("pods", namespace)
        assert pod["status"]["message"] == 'secret "keys" not found'

    waiting()
    cluster.apply(secret(namespace, current="here"))
    cluster.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=120s")
    [pod] = cluster.find("pods", namespace)
    assert get(pod, "/keys/current") == "here"


def test_pods_outlive_the_api_server(
    cluster: ControlPlane, namespace: str, runner: PodRunner, deploy: Callable[..., list[Object]]
) -> None:
    [pod] = deploy()
    pid = runner.program(pod["metadata"]["name"]).pid
    cluster.stop_api_server(grace=0)
    try:
        assert get(pod) == ""
    finally:
        cluster.start_api_server()
    assert runner.program(pod["metadata"]["name"]).pid == pid
    cluster.kubectl("scale", "deployment/web", "--replicas=0", "-n", namespace)
    cluster.kubectl("wait", "pod", "--all", "-n", namespace, "--for=delete", "--timeout=120s")
    assert not psutil.pid_exists(pid)


def test_nothing_runs_after_the_runner(
    cluster: ControlPlane, namespace: str, deploy: Callable[..., list[Object]]
) -> None:
    with PodRunner(cluster, namespace, serve) as runner:
        pids = [runner.program(pod["metadata"]["name"]).pid for pod in deploy(replicas=2, stubborn="yes")]
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


def test_failure_of_the_runner_fails_the_test(cluster: ControlPlane, namespace: str) -> None:
    launched = threading.Event()

    def launch(sandbox: Sandbox) -> Launch:
        launched.set()
        raise ValueError("no such program")

    with pytest.raises(ExceptionGroup) as failure, PodRunner(cluster, namespace, launch):
        cluster.apply(deployment(namespace, 1, []))
        assert launched.wait(120)
    assert failure.group_contains(ValueError, match="no such program")
