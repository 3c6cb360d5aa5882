"""The control plane that other tests stand on: real, closed to strangers, and gone when the run is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jwt
import psutil
import pytest
import trustme

from cluster import build
from cluster.client import KubectlError
from cluster.control_plane import ISSUER, ControlPlane
from cluster.kubeconfig import write_kubeconfig
from harness.stage import until

CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"answer": "42"}}


def test_kubectl_and_server_are_the_pinned_version(cluster: ControlPlane) -> None:
    versions = json.loads(cluster.kubectl("version", "-o", "json"))
    assert f"k8s.io/kubernetes {versions['serverVersion']['gitVersion']}" in (build.SOURCES / "go.mod").read_text()
    assert versions["clientVersion"]["gitVersion"] == versions["serverVersion"]["gitVersion"]


def test_applied_object_comes_back(cluster: ControlPlane, namespace: str) -> None:
    cluster.apply(in_namespace(CONFIG_MAP, namespace))
    assert cluster.get("configmap", "settings", namespace)["data"] == {"answer": "42"}
    assert "settings" in [each["metadata"]["name"] for each in cluster.find("configmaps", namespace)]


def test_unknown_field_is_refused(cluster: ControlPlane, namespace: str) -> None:
    with pytest.raises(KubectlError, match='unknown field "dta"'):
        cluster.apply(in_namespace(CONFIG_MAP, namespace) | {"dta": {}})


def test_service_account_may_do_what_rbac_allows_and_no_more(cluster: ControlPlane, namespace: str) -> None:
    cluster.kubectl("create", "serviceaccount", "reader", "-n", namespace)
    reader = cluster.service_account_kubeconfig(namespace, "reader")
    me = f"system:serviceaccount:{namespace}:reader"
    assert me in cluster.kubectl("auth", "whoami", kubeconfig=reader)
    with pytest.raises(KubectlError, match=rf'User "{me}" cannot list resource "configmaps"'):
        cluster.kubectl("get", "configmaps", kubeconfig=reader)

    cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=configmaps", "-n", namespace)
    cluster.kubectl(
        "create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:reader", "-n", namespace
    )
    until(lambda: "kube-root-ca.crt" in cluster.kubectl("get", "configmaps", kubeconfig=reader))
    with pytest.raises(KubectlError, match="Forbidden"):
        cluster.apply(CONFIG_MAP, kubeconfig=reader)


def test_token_is_verified_by_the_published_keys(cluster: ControlPlane, namespace: str) -> None:
    token = cluster.service_account_token(namespace, "default", audience="evenhand")
    discovery = json.loads(cluster.kubectl("get", "--raw", "/.well-known/openid-configuration"))
    assert discovery["issuer"] == ISSUER
    keys = jwt.PyJWKSet.from_json(cluster.kubectl("get", "--raw", "/openid/v1/jwks"))
    key = keys[jwt.get_unverified_header(token)["kid"]]
    claims = jwt.decode(token, key, algorithms=["RS256"], audience="evenhand", issuer=ISSUER)
    assert claims["sub"] == f"system:serviceaccount:{namespace}:default"
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(token, key, algorithms=["RS256"], audience="another", issuer=ISSUER)


def test_token_for_another_audience_is_a_stranger_to_the_api_server(
    cluster: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    token = cluster.service_account_token(namespace, "default", audience="evenhand")
    stranger = write_kubeconfig(tmp_path / "kubeconfig", cluster.server, cluster.authority, {"token": token})
    with pytest.raises(KubectlError, match="Unauthorized"):
        cluster.kubectl("auth", "whoami", kubeconfig=stranger)


def test_server_is_verified_by_its_authority(cluster: ControlPlane, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.crt")
    astray = write_kubeconfig(tmp_path / "kubeconfig", cluster.server, tmp_path / "other.crt", {"token": "secret"})
    with pytest.raises(KubectlError, match="certificate signed by unknown authority"):
        cluster.kubectl("get", "--raw", "/readyz", kubeconfig=astray)


@pytest.mark.parametrize("grace", [0, 2], ids=["crash", "restart"])
def test_objects_and_tokens_outlive_the_api_server(cluster: ControlPlane, namespace: str, grace: float) -> None:
    cluster.apply(in_namespace(CONFIG_MAP, namespace))
    before = cluster.get("configmap", "settings", namespace)
    default = cluster.service_account_kubeconfig(namespace, "default")
    cluster.stop_api_server(grace)
    try:
        with pytest.raises(KubectlError, match="was refused"):
            cluster.get("configmap", "settings", namespace)
    finally:
        cluster.start_api_server()
    assert cluster.get("configmap", "settings", namespace) == before
    assert namespace in cluster.kubectl("auth", "whoami", kubeconfig=default)


def test_kstatus_tells_current_from_in_progress(cluster: ControlPlane, namespace: str) -> None:
    cluster.apply(in_namespace(CONFIG_MAP, namespace))
    stored = cluster.get("configmap", "settings", namespace)
    unready = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": namespace},
        "status": {"phase": "Pending"},
    }
    leaving = {**stored, "metadata": {**stored["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    answers = cluster.kstatus([stored, unready, leaving])
    assert [each["status"] for each in answers] == ["Current", "InProgress", "Terminating"]
    assert [each["name"] for each in answers] == ["settings", "p", "settings"]


@pytest.mark.parametrize("end", ["raise SystemExit('failed')", "os.kill(os.getpid(), 9)"], ids=["failure", "kill -9"])
def test_nothing_outlives_the_test_run(cluster: ControlPlane, tmp_path: Path, end: str) -> None:
    pids = tmp_path / "pids"
    (tmp_path / "test_it.py").write_text(f"""
import os

def test_it(cluster):
    programs = cluster.etcd, cluster.api_server, cluster.controller_manager
    open({str(pids)!r}, "w").write(" ".join(str(each.pid) for each in programs))
    {end}
""")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "cluster.fixtures",
        "-c",
        os.devnull,
        f"--basetemp={tmp_path / 'run'}",
        tmp_path,
    ]
    environment = os.environ | {"PYTHONPATH": str(build.SOURCES.parent)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280
    )
    assert done.returncode, done.stdout
    processes = [psutil.Process(int(pid)) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert [each.name() for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
    assert len(pids.read_text().split()) == 3


def test_programs_of_kubebuilder_assets_are_used(tmp_path: Path) -> None:
    (tmp_path / "kubectl").touch(mode=0o755)
    environment = {"KUBEBUILDER_ASSETS": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert build.programs(environment)["kubectl"] == tmp_path / "kubectl"
    assert set(build.missing_programs(environment)) == set(build.PROGRAMS) - {"kubectl"}


def in_namespace(template: dict[str, object], namespace: str) -> dict[str, object]:
    """A copy of an object, in a namespace."""
    metadata = template["metadata"]
    assert isinstance(metadata, dict)
    return {**template, "metadata": {**metadata, "namespace": namespace}}
