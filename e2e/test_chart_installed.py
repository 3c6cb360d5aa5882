"""The Helm charts on a real API server and its controllers: installed, upgraded, rolled back and uninstalled by Helm itself.

The tests are one story, in this order.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.client import KubectlError
from cluster.control_plane import ControlPlane
from cluster.fixtures import new_control_plane
from harness.helm import CHART, CRDS_CHART, NAMESPACE, RELEASE, Helm, HelmError, setting
from harness.objects import policy
from harness.stage import until

Object = dict[str, Any]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane of its own, since what is installed here reaches beyond one namespace."""
    with new_control_plane(tmp_path_factory.mktemp("chart")) as control_plane:
        yield control_plane


@pytest.fixture(scope="module")
def helm(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(tmp_path_factory.mktemp("helm"), plane.kubeconfig)


def upgrade(helm: Helm, *options: str | Path) -> str:
    """Exactly these values: without any, Helm would take those of the last time."""
    where = ["-n", NAMESPACE, "--create-namespace", "--reset-values"]
    return helm("upgrade", "--install", RELEASE, CHART, *where, *options)


@pytest.fixture(scope="module")
def before(plane: ControlPlane) -> set[str]:
    """Everything in the cluster before anything of ours was."""
    return plane.everything()


def test_chart_says_what_it_lacks_without_the_kinds(helm: Helm, before: set[str]) -> None:
    with pytest.raises(HelmError, match='no matches for kind "EnginePool"'):
        upgrade(helm)
    helm("uninstall", RELEASE, "-n", NAMESPACE, "--ignore-not-found")


def test_both_charts_install_in_order(plane: ControlPlane, helm: Helm, before: set[str]) -> None:
    helm("install", "evenhand-crds", CRDS_CHART, "-n", NAMESPACE, "--create-namespace")
    plane.kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=120s")
    said = upgrade(helm)
    assert "kubectl wait enginepool default -n inference" in said
    for name, namespace, replicas in (("evenhand-operator", NAMESPACE, 2), ("evenhand-engine", "inference", 1)):
        wait = ["wait", f"deployment/{name}", "-n", namespace, f"--for=jsonpath={{.status.replicas}}={replicas}"]
        plane.kubectl(*wait, "--timeout=120s")


def test_nothing_is_different_right_after_it(plane: ControlPlane, helm: Helm, tmp_path: Path, before: set[str]) -> None:
    (tmp_path / "rendered.yaml").write_text(helm("template", RELEASE, CHART, "-n", NAMESPACE))
    quiet = [
        "diff",
        "--server-side",
        "--field-manager=gitops",
        "--force-conflicts",
        "-f",
        str(tmp_path / "rendered.yaml"),
    ]
    assert plane.kubectl(*quiet) == ""
    loud = (tmp_path / "rendered.yaml").read_text().replace("replicas: 2", "replicas: 3")
    (tmp_path / "rendered.yaml").write_text(loud)
    with pytest.raises(KubectlError, match=r"\+  replicas: 3"):
        plane.kubectl(*quiet)


def test_a_field_that_does_not_exist_is_refused(helm: Helm, before: set[str]) -> None:
    """Helm applies on the server, which knows every field."""
    with pytest.raises(HelmError, match=r"spec\.weigth.*field not declared in schema"):
        upgrade(helm, *setting(pools__default__spec={"weigth": 1}))
    helm("rollback", RELEASE, "-n", NAMESPACE)


def test_a_pool_is_added_and_taken_away_by_values(plane: ControlPlane, helm: Helm, before: set[str]) -> None:
    def pools() -> set[str]:
        return set(plane.kubectl("get", "enginepools", "-A", "-o", "name").split())

    upgrade(helm, *setting(pools__gold={"namespace": "llm", "hpa": {"enabled": True, "maxReplicas": 2}}))
    assert pools() == {"enginepool.evenhand.dev/default", "enginepool.evenhand.dev/gold"}
    wait = ["wait", "deployment/evenhand-engine-gold", "-n", "llm", "--for=jsonpath={.status.replicas}=1"]
    plane.kubectl(*wait, "--timeout=120s")
    plane.kubectl("scale", "deployment/evenhand-engine-gold", "-n", "llm", "--replicas=2")
    upgrade(helm, *setting(pools__gold={"namespace": "llm", "hpa": {"enabled": True, "maxReplicas": 3}}))
    assert plane.get("deployment", "evenhand-engine-gold", "llm")["spec"]["replicas"] == 2, "what scales it has it"
    assert can_write_secrets(plane, "llm")
    upgrade(helm)
    assert pools() == {"enginepool.evenhand.dev/default"}
    assert not can_write_secrets(plane, "llm")
    assert plane.get("namespace", "llm"), "others may have things there"


def can_write_secrets(plane: ControlPlane, namespace: str) -> bool:
    """Whether the operator may, by the API server's own judgement."""
    account = f"--as=system:serviceaccount:{NAMESPACE}:evenhand-operator"
    try:
        return plane.kubectl("auth", "can-i", "create", "secrets", "-n", namespace, account).strip() == "yes"
    except KubectlError:
        return False


def test_production_values_go_in_and_are_rolled_back(plane: ControlPlane, helm: Helm, before: set[str]) -> None:
    def image() -> str:
        spec = plane.get("deployment", "evenhand-engine", "inference")["spec"]["template"]["spec"]
        return str(spec["containers"][0]["image"])

    assert image() == "evenhand.dev/engine:0.1.0"
    upgrade(helm, "-f", CHART / "ci/prod-values.yaml")
    assert image() == "evenhand.dev/engine:0.1.0-cuda"
    assert plane.get("deployment", "evenhand-engine", "inference")["spec"]["replicas"] == 3
    helm("rollback", RELEASE, "-n", NAMESPACE)
    assert image() == "evenhand.dev/engine:0.1.0"


def test_upgrade_of_the_kinds_keeps_the_objects(plane: ControlPlane, helm: Helm, before: set[str]) -> None:
    """Also where they were changed meanwhile, as an older version of them would be."""
    plane.apply(policy("inference", "chat"))
    uid = plane.get("tpol", "chat", "inference")["metadata"]["uid"]
    crd = "crd/tenantpolicies.evenhand.dev"
    column = [{"op": "remove", "path": "/spec/versions/0/additionalPrinterColumns"}]
    plane.kubectl("patch", crd, "--type=json", "-p", json.dumps(column))
    helm("upgrade", "evenhand-crds", CRDS_CHART, "-n", NAMESPACE, "--force-conflicts")
    until(lambda: "CLASS" in plane.kubectl("get", "tpol", "-n", "inference"))
    assert plane.get("tpol", "chat", "inference")["metadata"]["uid"] == uid


def test_uninstalling_leaves_policies_kinds_and_namespaces_and_no_more(
    plane: ControlPlane, helm: Helm, before: set[str]
) -> None:
    helm("uninstall", RELEASE, "-n", NAMESPACE)
    helm("uninstall", "evenhand-crds", "-n", NAMESPACE)
    assert plane.get("tpol", "chat", "inference")
    plane.kubectl("delete", "crd", "tenantpolicies.evenhand.dev", "enginepools.evenhand.dev", "--timeout=120s")
    for namespace in ("inference", "llm", NAMESPACE):
        plane.kubectl(
            "delete", "pods", "--all", "-n", namespace, "--force", "--wait=false"
        )  # no kubelet says they ended
    plane.kubectl("delete", "namespace", "inference", "llm", NAMESPACE, "--timeout=120s")
    until(lambda: plane.everything() <= before)
