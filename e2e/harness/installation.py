"""Evenhand as `kubectl apply -k` installs it, with real processes behind the Pods: the operator, and engines with a model.

What runs is what `manifests/overlays/dev` says, from the arguments to the rights; only sizes are made to fit a test.
"""

import base64
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import openai
import yaml

from cluster import build
from cluster.control_plane import ControlPlane
from cluster.pod_runner import PodRunner
from cluster.sandbox import Launch, Sandbox
from evenhand_policy.bootstrap import mounted_keys, read_manifest, secret_name
from harness.objects import ADMIN_PORT, api_key, policy, secret
from harness.operator_process import read_json
from harness.stage import Stage, until

REPOSITORY = build.SOURCES.parents[1]
NAMESPACE = "inference"
OPERATOR_NAMESPACE, OPERATOR = "evenhand-system", "evenhand-operator"
PORT = 8000
MODEL = "smollm2-135m-instruct"

TOKENS_PER_STEP = 32
MOST_RUNNING = 8
_SIZES = [
    f"--max-num-batched-tokens={TOKENS_PER_STEP}",
    f"--max-num-seqs={MOST_RUNNING}",
    "--max-model-len=8192",
    "--kv-cache-memory-bytes=384M",
]

Object = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """One engine pod, at its own address."""

    name: str
    address: str

    def client(self, api_key: str) -> openai.OpenAI:
        """The official client, as a tenant uses it."""
        return openai.OpenAI(base_url=self.url, api_key=api_key, max_retries=0, timeout=300)

    @property
    def url(self) -> str:
        """What a client needs to know."""
        return f"http://{self.address}:{PORT}/v1"

    def tenants(self) -> dict[str, Object]:
        """Live state of each tenant, by name: service, requests that wait, ..."""
        state = read_json(f"http://{self.address}:{ADMIN_PORT}/v1/tenants")
        return {row["tenantId"]: row for row in state["tenants"]}

    def service(self, *names: str) -> list[int]:
        """What was charged to tenants so far: tokens, by their prices."""
        tenants = self.tenants()
        return [tenants[name].get("service", 0) for name in names]

    def report(self) -> Object:
        """Boot id, version and source of the config in force."""
        return read_json(f"http://{self.address}:{ADMIN_PORT}/v1/scheduler-config/report")

    def answer(self, key: str) -> str:
        """`ok`, or the code of the refusal, of a smallest request with this credential."""
        with self.client(key) as client:
            try:
                client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=1)
            except openai.APIStatusError as refused:
                return str(refused.code)
        return "ok"

    @contextlib.contextmanager
    def stream(self, key: str, num_tokens: int) -> Iterator[openai.Stream[openai.types.Completion]]:
        """A request that is running: its first token is there."""
        with (
            self.client(key) as client,
            client.completions.create(
                model=MODEL,
                prompt="Once upon a time",
                max_tokens=num_tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            ) as tokens,
        ):
            next(iter(tokens))
            yield tokens


class Installation(Stage):
    """Operator and engines of the dev overlay on a control plane. Entered, they run."""

    cluster: ControlPlane

    def __init__(self, cluster: ControlPlane, directory: Path, num_engines: int = 2) -> None:
        super().__init__(cluster, NAMESPACE, "/v1/scheduler-config")
        self._directory = directory
        self._num_engines = num_engines

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._install()
            self.pods = stack.enter_context(PodRunner(self.cluster, NAMESPACE, _launch_engine))
            self.operator_pods = stack.enter_context(PodRunner(self.cluster, OPERATOR_NAMESPACE, self._launch_operator))
            until(lambda: self.pool()["status"]["applied"] == f"{self._num_engines}/{self._num_engines}", timeout=600)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _install(self) -> None:
        kubectl = self.cluster.kubectl
        kubectl("apply", "--server-side", "-k", str(REPOSITORY / "crds"))
        kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=120s")
        self._directory.mkdir()
        write_kustomization(self._directory, self._num_engines)
        kubectl("apply", "--server-side", "-k", str(self._directory))
        self._operator_kubeconfig = self.cluster.service_account_kubeconfig(OPERATOR_NAMESPACE, OPERATOR)

    def _launch_operator(self, sandbox: Sandbox) -> Launch:
        own = sandbox.own_command()
        environment = _on_this_machine(own, KUBECONFIG=str(self._operator_kubeconfig))
        return Launch([*own.command, f"--host={sandbox.address}"], environment)

    def engines(self) -> list[Engine]:
        """Those in service, by name."""
        pods = sorted(self.ready_pods(), key=lambda pod: str(pod["metadata"]["name"]))
        return [Engine(pod["metadata"]["name"], pod["status"]["podIP"]) for pod in pods]

    def all_pods(self) -> list[Object]:
        """Of engines and operator."""
        return [*self.ready_pods(), *self.cluster.find("pods", OPERATOR_NAMESPACE)]

    def answers(self, key: str) -> list[str]:
        """Of each engine."""
        return [engine.answer(key) for engine in self.engines()]

    def admit(self, name: str, **spec: Any) -> str:
        """Applies a policy of this name and a Secret with its API key, which is returned, and waits until it is Ready."""
        self.apply(name, **spec)
        self.wait_ready(name)
        return key_of(name)

    def apply(self, name: str, **spec: Any) -> None:
        """Applies a policy and a Secret with its API key."""
        spec.setdefault("identities", [api_key(f"{name}-keys")])
        self.cluster.apply(secret(NAMESPACE, f"{name}-keys", one=key_of(name)), policy(NAMESPACE, name, **spec))

    def dismiss(self, *names: str) -> None:
        """Deletes policies."""
        self.kubectl("delete", "tpol", *names)

    def wait_stored(self) -> None:
        """Returns once what is enforced is what a new pod would begin with: the operator stores it a little later."""

        def stored() -> int:
            data = self.cluster.get("secret", secret_name("default", None), NAMESPACE)["data"]
            files = {name: base64.b64decode(content) for name, content in data.items()}
            return read_manifest(files, mounted_keys(files)).revision

        until(lambda: stored() == self.pool()["status"]["revision"])

    def scale_operator(self, replicas: int) -> None:
        """Returns once so many run."""
        deployment = [f"deployment/{OPERATOR}", "-n", OPERATOR_NAMESPACE]
        self.cluster.kubectl("scale", *deployment, f"--replicas={replicas}")
        self.cluster.kubectl("rollout", "status", *deployment, "--timeout=120s")
        until(lambda: len(self.cluster.find("pods", OPERATOR_NAMESPACE)) == replicas)

    def operator_pid(self) -> int:
        """Of the one that runs."""
        [pod] = self.cluster.find("pods", OPERATOR_NAMESPACE)
        return self.operator_pods.program(pod["metadata"]["name"]).pid

    def logs(self) -> str:
        """Everything that operator and engines have written."""
        return "\n".join(path.read_text() for path in self.cluster.directory.glob("pods-*/*/*.log"))


def key_of(tenant: str) -> str:
    """The API key of a tenant."""
    return f"key-of-{tenant}-0123456789abcdef"


def write_kustomization(directory: Path, num_engines: int) -> None:
    """The dev overlay, with engines that are small enough for a test."""
    arguments = [{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": value} for value in _SIZES]
    # once ready, it stays so while its process is stopped: the operator loses it, the Service would not
    probe = {"op": "add", "path": "/spec/template/spec/containers/0/readinessProbe/failureThreshold", "value": 1000}
    patch = {
        "target": {"kind": "Deployment", "name": "evenhand-engine"},
        "patch": yaml.safe_dump([*arguments, probe]),
    }
    overlay = os.path.relpath(REPOSITORY / "manifests/overlays/dev", directory.resolve())
    kustomization = {
        "resources": [overlay],
        "replicas": [{"name": "evenhand-engine", "count": num_engines}],
        "patches": [patch],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))


def _launch_engine(sandbox: Sandbox) -> Launch:
    """With the machine's own cache, where the model is already."""
    own = sandbox.own_command()
    cache = {"HOME": str(Path.home()), "XDG_CACHE_HOME": str(build.cache_folder().parent)}
    return Launch(own.command, _on_this_machine(own, **cache))


def _on_this_machine(own: Launch, **environment: str) -> dict[str, str]:
    """The environment of a container, in which the programs of this virtual environment are found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**(own.environment or {}), "PATH": path, **environment}


@contextlib.contextmanager
def installed(directory: Path) -> Iterator[Installation]:
    """An installation on a control plane of its own, since it reaches beyond one namespace."""
    with (
        ControlPlane(build.programs(), directory) as cluster,
        Installation(cluster, directory / "kustomize") as installation,
    ):
        yield installation
