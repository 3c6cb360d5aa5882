"""The kustomize component of the sidecar: an existing Deployment gets it, and a real API server and its controllers take it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster import build
from cluster.control_plane import ControlPlane
from cluster.fixtures import new_control_plane

REPOSITORY = build.SOURCES.parents[1]
NAMESPACE = "inference"
DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: vllm
  namespace: inference
  labels: {evenhand.dev/sidecar: inject}
spec:
  selector: {matchLabels: {app: vllm}}
  template:
    metadata: {labels: {app: vllm}}
    spec:
      initContainers:
        - name: fetch
          image: fetch
          securityContext: &restricted
            runAsNonRoot: true
            runAsUser: 1000
            allowPrivilegeEscalation: false
            capabilities: {drop: [ALL]}
            seccompProfile: {type: RuntimeDefault}
      containers:
        - name: vllm
          image: vllm
          args: [--host=127.0.0.1, --port=8001]
          lifecycle: {preStop: {sleep: {seconds: 1}}}
          securityContext: *restricted
        - name: exporter
          image: exporter
          securityContext: *restricted
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    directory = tmp_path_factory.mktemp("sidecar")
    (directory / "deployment.yaml").write_text(DEPLOYMENT)
    component = os.path.relpath(REPOSITORY / "manifests/components/sidecar", directory)
    kustomization = {"resources": ["deployment.yaml"], "components": [component]}
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    with new_control_plane(tmp_path_factory.mktemp("cluster")) as plane:
        plane.kubectl("apply", "--server-side", "--validate=strict", "-k", f"{REPOSITORY}/crds")
        plane.kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=120s")
        plane.kubectl("apply", "--server-side", "--validate=strict", "-k", f"{REPOSITORY}/manifests/overlays/dev")
        plane.kubectl("apply", "--server-side", "--validate=strict", "-k", str(directory))
        yield plane


@pytest.fixture(scope="module")
def pod(cluster: ControlPlane) -> dict[str, Any]:
    """What the Deployment's controllers made, in a namespace that enforces restricted Pods."""
    wait = ["wait", "deployment/vllm", "-n", NAMESPACE, "--for=jsonpath={.status.replicas}=1", "--timeout=120s"]
    cluster.kubectl(*wait)
    [found] = yaml.safe_load(cluster.kubectl("get", "pods", "-n", NAMESPACE, "-l", "app=vllm", "-o", "yaml"))["items"]
    return dict(found)


def test_it_starts_before_the_engine_and_ends_after_it(pod: dict[str, Any]) -> None:
    first, *others = pod["spec"]["initContainers"]
    assert (first["name"], first["restartPolicy"]) == ("evenhand-sidecar", "Always")  # a native sidecar
    assert [other["name"] for other in others] == ["fetch"]
    assert [container["name"] for container in pod["spec"]["containers"]] == ["vllm", "exporter"]


def test_the_engine_is_told_to_end_when_the_sidecar_has_drained(pod: dict[str, Any]) -> None:
    """Hooks run at once when a Pod is to end; SIGTERM comes to the engine after its hook, to a native sidecar after the engine."""
    sidecar, engine = pod["spec"]["initContainers"][0], pod["spec"]["containers"][0]
    assert engine["lifecycle"]["preStop"] == {"httpGet": {"path": "/drained", "port": 9000, "scheme": "HTTP"}}
    assert sidecar["lifecycle"]["preStop"]["exec"]["command"][-1].endswith("kill -USR1 1")
    assert {"containerPort": 9000, "name": "admin", "protocol": "TCP"} in sidecar["ports"]
    drain = next(int(each.partition("=")[2]) for each in sidecar["args"] if each.startswith("--drain-timeout="))
    assert pod["spec"]["terminationGracePeriodSeconds"] >= drain + 10 + 10


def test_a_pool_can_select_it_and_the_operators_secrets_are_mounted(pod: dict[str, Any]) -> None:
    sidecar = pod["spec"]["initContainers"][0]
    pool = next(each.rpartition("/")[2] for each in sidecar["args"] if each.startswith("--pool="))
    assert pod["metadata"]["labels"]["evenhand.dev/pool"] == pool
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["name"] for mount in sidecar["volumeMounts"]}
    assert mounts & volumes.keys() >= {"evenhand-bootstrap", "evenhand-identity", "evenhand-state"}
    secrets = [source["secret"]["name"] for source in volumes["evenhand-bootstrap"]["projected"]["sources"]]
    assert all(name.startswith(f"evenhand-bootstrap-{pool}-") for name in secrets)


def test_only_the_operator_and_the_monitoring_reach_its_admin_port(cluster: ControlPlane, pod: dict[str, Any]) -> None:
    policy = yaml.safe_load(cluster.kubectl("get", "networkpolicy", "evenhand-sidecar", "-n", NAMESPACE, "-o", "yaml"))
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    for rule in policy["spec"]["ingress"]:
        is_open = rule["from"] == [{"namespaceSelector": {}}]
        assert [port["port"] for port in rule["ports"]] == (["http"] if is_open else ["admin"])
