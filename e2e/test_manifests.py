"""What `kubectl apply -k` installs: accepted to the last field, run by the controllers, allowed no more than it needs."""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import build
from cluster.client import KubectlError
from cluster.control_plane import ControlPlane
from cluster.fixtures import new_control_plane
from harness.kustomize import render
from harness.stage import until

REPOSITORY = build.SOURCES.parents[1]
OPERATOR_NAMESPACE, ENGINE_NAMESPACE = "evenhand-system", "inference"

Object = dict[str, Any]


@pytest.fixture(scope="module", params=["dev", "prod"])
def overlay(request: pytest.FixtureRequest) -> str:
    return f"{REPOSITORY}/manifests/overlays/{request.param}"


@pytest.fixture(scope="module")
def installed(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of its own, since what is installed here reaches beyond one namespace."""
    with new_control_plane(tmp_path_factory.mktemp("manifests")) as cluster:
        cluster.kubectl("apply", "--server-side", "--validate=strict", "-k", f"{REPOSITORY}/crds")
        cluster.kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=120s")
        cluster.kubectl("apply", "--server-side", "--validate=strict", "-k", overlay)
        yield cluster


@pytest.fixture
def operator_may(installed: ControlPlane) -> Callable[..., bool]:
    """Whether the operator's ServiceAccount may do something, by the API server's own judgement."""
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{OPERATOR_NAMESPACE}"]

    def may(verb: str, resource: str, namespace: str = "default", subresource: str = "") -> bool:
        user = f"system:serviceaccount:{OPERATOR_NAMESPACE}:evenhand-operator"
        return installed.allows(user, verb, resource, namespace, subresource, *groups)

    until(lambda: may("create", "leases.coordination.k8s.io", OPERATOR_NAMESPACE))  # rights are in force soon
    return may


def test_applying_again_changes_nothing(installed: ControlPlane, overlay: str) -> None:
    assert installed.kubectl("diff", "--server-side", "-k", overlay) == ""
    assert installed.kubectl("diff", "--server-side", "-k", f"{REPOSITORY}/crds") == ""


def test_pods_are_made_in_namespaces_that_enforce_restricted(installed: ControlPlane, overlay: str) -> None:
    for deployment in rendered(installed, overlay, "Deployment"):
        name, namespace = deployment["metadata"]["name"], deployment["metadata"]["namespace"]
        replicas = deployment["spec"]["replicas"]
        wait = ["wait", f"deployment/{name}", "-n", namespace, f"--for=jsonpath={{.status.replicas}}={replicas}"]
        installed.kubectl(*wait, "--timeout=120s")
    for namespace in (OPERATOR_NAMESPACE, ENGINE_NAMESPACE):
        with pytest.raises(KubectlError, match='violates PodSecurity "restricted:latest"'):
            installed.kubectl("run", "intruder", "--image=intruder", "-n", namespace)


OF_OTHERS = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "ScaledObject", "Certificate"}
"""Kinds that somebody else's operator brings."""


@pytest.mark.parametrize(
    "components",
    [
        ["hpa"],
        ["keda", "monitoring"],
        ["model-claim", "model-hub"],
        ["model-host-path"],
        ["model-image"],
        ["node-gateways"],
        ["priority-class"],
        ["tls"],
    ],
    ids="+".join,
)
def test_components_are_accepted_to_the_last_field(
    installed: ControlPlane, overlay: str, tmp_path: Path, components: list[str]
) -> None:
    """By the API server, and a Pod of the engines by the namespace's restricted profile."""
    objects = render(tmp_path, *components, overlay=Path(overlay).name)
    ours = json.dumps(
        {"apiVersion": "v1", "kind": "List", "items": [each for each in objects if each["kind"] not in OF_OTHERS]}
    )
    dry = ["apply", "--server-side", "--validate=strict", "--dry-run=server", "-f", "-", "-o", "json"]
    accepted = {
        (each["kind"], each["metadata"]["name"]): each
        for each in json.loads(installed.kubectl(*dry, stdin=ours))["items"]
    }
    template = accepted["Deployment", "evenhand-engine"]["spec"]["template"]
    metadata = {"name": "engine", "namespace": ENGINE_NAMESPACE, "labels": template["metadata"]["labels"]}
    spec = template["spec"] | {"priorityClassName": None}  # the class is not there yet
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    installed.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
    [asked] = [
        each["spec"]["template"]["spec"]
        for each in objects
        if each["metadata"]["name"] == "evenhand-engine" and each["kind"] == "Deployment"
    ]
    volumes = {each["name"]: each.keys() for each in template["spec"]["volumes"]}
    assert {each["name"]: each.keys() for each in asked["volumes"]} == volumes, (
        "none was dropped for a gate that is off"
    )


def test_every_component_is_tried() -> None:
    tried = {"sidecar", "all-namespaces"}  # in test_sidecar_component.py, and in the production overlay
    for mark in test_components_are_accepted_to_the_last_field.pytestmark:  # type: ignore[attr-defined]
        tried |= {name for names in mark.args[1] for name in names}
    assert {path.name for path in Path(REPOSITORY, "manifests/components").iterdir()} == tried


def test_pool_selects_the_engines_and_the_service_hides_their_admin_port(installed: ControlPlane, overlay: str) -> None:
    [pool] = rendered(installed, overlay, "EnginePool")
    [engine] = [each for each in rendered(installed, overlay, "Deployment") if "engine" in each["metadata"]["name"]]
    [service] = [each for each in rendered(installed, overlay, "Service") if "engine" in each["metadata"]["name"]]
    template = engine["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]
    assert template["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("verbs", "resource", "subresource"),
    [
        ("list watch", "tenantpolicies.evenhand.dev", ""),
        ("list watch", "enginepools.evenhand.dev", ""),
        ("patch", "tenantpolicies.evenhand.dev", "status"),
        ("patch", "enginepools.evenhand.dev", "status"),
        ("list watch", "pods", ""),
        ("get list watch", "secrets", ""),
        ("create", "events", ""),
    ],
)
def test_operator_may_do_its_work_where_it_serves(
    operator_may: Callable[..., bool], overlay: str, verbs: str, resource: str, subresource: str
) -> None:
    everywhere = overlay.endswith("prod")
    for verb in verbs.split():
        assert operator_may(verb, resource, ENGINE_NAMESPACE, subresource)
        assert operator_may(verb, resource, "default", subresource) is everywhere


def test_operator_writes_secrets_where_pools_are(operator_may: Callable[..., bool]) -> None:
    for verb in ("create", "update"):
        assert operator_may(verb, "secrets", ENGINE_NAMESPACE)
        assert not operator_may(verb, "secrets", "default")
    for verb in ("patch", "delete"):
        assert not operator_may(verb, "secrets", ENGINE_NAMESPACE)


def test_operator_may_lead_and_verify_and_no_more(operator_may: Callable[..., bool], overlay: str) -> None:
    everywhere = overlay.endswith("prod")
    assert operator_may("create", "leases.coordination.k8s.io", OPERATOR_NAMESPACE)
    assert operator_may("update", "leases.coordination.k8s.io/evenhand-operator", OPERATOR_NAMESPACE)
    assert operator_may("get", "/openid/v1/jwks")
    assert operator_may("get", "/.well-known/openid-configuration")
    assert operator_may("get", "namespaces/kube-system")
    assert operator_may("list", "namespaces") is everywhere

    assert not operator_may("update", "leases.coordination.k8s.io/another", OPERATOR_NAMESPACE)
    assert not operator_may("create", "leases.coordination.k8s.io", ENGINE_NAMESPACE)
    for verb in ("create", "update", "patch", "delete"):
        assert not operator_may(verb, "tenantpolicies.evenhand.dev", ENGINE_NAMESPACE)
        assert not operator_may(verb, "enginepools.evenhand.dev", ENGINE_NAMESPACE)
        assert not operator_may(verb, "deployments.apps", ENGINE_NAMESPACE)
        assert not operator_may(verb, "roles.rbac.authorization.k8s.io", ENGINE_NAMESPACE)
    for verb in ("create", "update", "patch", "delete", "get"):
        assert not operator_may(verb, "pods", ENGINE_NAMESPACE)
    for kind in ("tenantpolicies.evenhand.dev", "enginepools.evenhand.dev"):
        assert not operator_may("get", kind, ENGINE_NAMESPACE), "it lists and watches"
    assert not operator_may("patch", "events", ENGINE_NAMESPACE)
    assert not operator_may("delete", "secrets", ENGINE_NAMESPACE)
    assert not operator_may("create", "pods", ENGINE_NAMESPACE, "exec")
    assert not operator_may("create", "serviceaccounts", ENGINE_NAMESPACE, "token")
    assert not operator_may("impersonate", "users")


def test_lease_is_renewed_apart_from_all_other_requests(installed: ControlPlane) -> None:
    """Which flow a request was counted to is told in the answer to it."""
    token = installed.service_account_token(OPERATOR_NAMESPACE, "evenhand-operator")
    context = ssl.create_default_context(cafile=installed.authority)

    def flow(path: str) -> str:
        request = urllib.request.Request(installed.server + path, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, context=context, timeout=60) as answer:
                return str(answer.headers["X-Kubernetes-PF-FlowSchema-UID"])
        except urllib.error.HTTPError as error:  # there is no Lease yet
            return str(error.headers["X-Kubernetes-PF-FlowSchema-UID"])

    own = installed.get("flowschema", "evenhand-operator-lease")["metadata"]["uid"]
    leases = f"/apis/coordination.k8s.io/v1/namespaces/{OPERATOR_NAMESPACE}/leases"
    until(lambda: flow(f"{leases}/evenhand-operator") == own)  # what is told apart, too
    assert flow(f"/apis/evenhand.dev/v1alpha1/namespaces/{ENGINE_NAMESPACE}/tenantpolicies") != own


def test_operator_writes_bootstrap_secrets_only(installed: ControlPlane) -> None:
    kubeconfig = installed.service_account_kubeconfig(OPERATOR_NAMESPACE, "evenhand-operator")

    def write(name: str, kind: str = "evenhand.dev/bootstrap", *options: str, **annotations: str) -> None:
        metadata = {"name": name, "namespace": ENGINE_NAMESPACE, "annotations": annotations}
        document = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind, "data": {"part": "AA=="}}
        verb = "replace" if name == "of-a-tenant" else "create"
        installed.kubectl(verb, "-f", "-", *options, stdin=json.dumps(document), kubeconfig=kubeconfig)

    def is_in_force() -> bool:
        try:
            write("planted", "evenhand.dev/bootstrap", "--dry-run=server")
        except KubectlError as refused:
            return "the operator writes no Secrets but those" in str(refused)
        return False

    write("evenhand-bootstrap-default-0")
    installed.kubectl(
        "create", "secret", "generic", "of-a-tenant", "-n", ENGINE_NAMESPACE, "--from-literal=current=theirs"
    )
    anybody = {"kubernetes.io/service-account.name": "evenhand-engine"}

    until(is_in_force)  # a moment after it was applied
    for name in ("planted", "evenhand-signing-key"):
        with pytest.raises(KubectlError, match="the operator writes no Secrets but those"):
            write(name)
    with pytest.raises(KubectlError, match="the operator writes no Secrets but those"):
        write("of-a-tenant", "Opaque")
    with pytest.raises(KubectlError, match="the operator writes no Secrets but those"):
        write("evenhand-bootstrap-x", "kubernetes.io/service-account-token", **anybody)
    with pytest.raises(KubectlError, match="the operator writes no Secrets but those"):
        write("evenhand-bootstrap-x", "Opaque")
    own = {
        "metadata": {"name": "evenhand-signing-key", "namespace": OPERATOR_NAMESPACE},
        "type": "evenhand.dev/signing-key",
    }
    create = ["create", "-f", "-"]
    installed.kubectl(*create, stdin=json.dumps({"apiVersion": "v1", "kind": "Secret", **own}), kubeconfig=kubeconfig)
    for name, kind in (("planted", "evenhand.dev/signing-key"), ("evenhand-signing-key2", "Opaque")):
        other = {"metadata": {"name": name, "namespace": OPERATOR_NAMESPACE}, "type": kind}
        with pytest.raises(KubectlError, match="the operator writes no Secrets but those"):
            installed.kubectl(
                *create, stdin=json.dumps({"apiVersion": "v1", "kind": "Secret", **other}), kubeconfig=kubeconfig
            )
    names = [each["metadata"]["name"] for each in installed.find("secrets", ENGINE_NAMESPACE, "")]
    assert "evenhand-bootstrap-x" not in names, "no token was made"


@pytest.mark.parametrize(
    ("role", "policies", "pools"),
    [
        ("view", "get list watch", "get list watch"),
        ("edit", "get list watch create update patch delete deletecollection", "get list watch"),
        ("admin", "get list watch create update patch delete deletecollection", "get list watch"),
        ("evenhand-viewer", "get list watch", "get list watch"),
        ("evenhand-tenant-editor", "get list watch create update patch delete deletecollection", ""),
        (
            "evenhand-pool-admin",
            "get list watch create update patch delete deletecollection",
            "get list watch create update patch delete deletecollection",
        ),
    ],
)
def test_roles_for_people(installed: ControlPlane, role: str, policies: str, pools: str) -> None:
    """Whoever edits a namespace edits its policies, and nobody a pool who was not made its administrator."""
    user = f"--user=jane-{role}"
    installed.kubectl("create", "rolebinding", f"jane-{role}", f"--clusterrole={role}", user, "-n", ENGINE_NAMESPACE)

    def may(verb: str, resource: str, subresource: str = "", namespace: str = ENGINE_NAMESPACE) -> bool:
        return installed.allows(f"jane-{role}", verb, f"{resource}.evenhand.dev", namespace, subresource)

    until(lambda: all(may(verb, "tenantpolicies") for verb in policies.split()))  # the controllers aggregate roles
    until(lambda: all(may(verb, "enginepools") for verb in pools.split()))
    writing = ("create", "update", "patch", "delete", "deletecollection")
    for resource, granted in (("tenantpolicies", policies), ("enginepools", pools)):
        assert not any(may(verb, resource) for verb in writing if verb not in granted.split())
        assert not may("patch", resource, "status"), "statuses are the operator's"
        assert not may("get", resource, namespace="default")


def rendered(cluster: ControlPlane, overlay: str, kind: str) -> list[Object]:
    """What kustomize makes of an overlay, of one kind."""
    return [each for each in yaml.safe_load_all(cluster.kubectl("kustomize", overlay)) if each["kind"] == kind]
