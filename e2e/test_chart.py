"""The Helm charts, rendered by Helm itself: the same objects as kustomize's."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.helm import CHART, CRDS_CHART, NAMESPACE, Helm, Objects, by_name, setting
from harness.kustomize import MANIFESTS, render

Object = dict[str, Any]

HELMS_OWN = {"helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/instance", "helm.sh/resource-policy"}
WAVE = "argocd.argoproj.io/sync-wave"


def alike(objects: list[Object]) -> Objects:
    """What matters of each object: without Helm's own marks, and without what kustomize adds to templates."""
    found = by_name(deepcopy(objects))
    for each in found.values():
        metadata = each["metadata"]
        for member in ("labels", "annotations"):
            kept = {key: value for key, value in metadata.pop(member, {}).items() if key not in HELMS_OWN}
            if kept:
                metadata[member] = kept
        template = each.get("spec", {}).get("template", {}).get("metadata", {})
        if template.get("annotations", {}).keys() == {WAVE}:
            del template["annotations"]
    return found


def without_own_namespace(objects: Objects) -> Objects:
    """Helm makes the release's namespace itself (`--create-namespace`), and so it is no part of a chart."""
    return {key: value for key, value in objects.items() if key != ("Namespace", "", NAMESPACE)}


def on_volume(volume: Object, **hub: object) -> list[str]:
    """Values for a model on a volume."""
    return setting(
        operator__replicas=1,
        image__tag="dev",
        poolDefaults__model="/models",
        poolDefaults__args=["--served-model-name=my-model"],
        poolDefaults__modelVolume=volume,
        poolDefaults__hub=hub,
    )


PROD = ["-f", CHART / "ci/prod-values.yaml"]
SAME: dict[str, tuple[str, list[str], list[str | Path]]] = {
    "dev": ("dev", [], setting(operator__replicas=1, image__tag="dev")),
    "prod": ("prod", [], [*PROD]),
    "all namespaces": (
        "dev",
        ["all-namespaces"],
        setting(operator__replicas=1, image__tag="dev", operator__allNamespaces=True),
    ),
    "model hub": ("prod", ["model-hub"], [*PROD, *setting(poolDefaults__hub__enabled=True)]),
    "gateways with a node's address": (
        "prod",
        ["node-gateways"],
        [
            *PROD,
            *setting(
                networkPolicy__gateways=["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fd00::/8"],
            ),
        ],
    ),
    "priority class": (
        "prod",
        ["priority-class"],
        [*PROD, *setting(priorityClass__create=True, poolDefaults__priorityClassName="evenhand-engine")],
    ),
    "TLS": (
        "prod",
        ["tls"],
        [*PROD, *setting(poolDefaults__tls__issuerRef={"kind": "ClusterIssuer", "name": "internal"})],
    ),
    "autoscaler": ("prod", ["hpa"], [*PROD, *setting(poolDefaults__hpa__enabled=True)]),
    "KEDA": ("prod", ["keda"], [*PROD, *setting(poolDefaults__keda__enabled=True)]),
    "model on a claim": (
        "dev",
        ["model-hub", "model-claim"],
        on_volume(
            {"persistentVolumeClaim": {"claimName": "evenhand-model"}},
            enabled=True,
            fetch="HuggingFaceTB/SmolLM2-360M-Instruct",
        ),
    ),
    "model in an image": (
        "dev",
        ["model-image"],
        on_volume({"image": {"reference": "registry.example/models/my-model:1", "pullPolicy": "IfNotPresent"}}),
    ),
    "model on the node": (
        "dev",
        ["model-host-path"],
        on_volume({"persistentVolumeClaim": {"claimName": "evenhand-model", "readOnly": True}}),
    ),
    "monitoring": ("prod", ["monitoring"], [*PROD, *setting(monitoring__enabled=True)]),
}


@pytest.mark.parametrize("installation", SAME)
def test_chart_and_kustomize_make_the_same_objects(helm: Helm, tmp_path: Path, installation: str) -> None:
    overlay, components, options = SAME[installation]
    by_kustomize = without_own_namespace(alike(render(tmp_path, *components, overlay=overlay)))
    by_kustomize = {
        key: each for key, each in by_kustomize.items() if "PersistentVolume" not in key[0]
    }  # yours to choose
    by_helm = alike(helm.template(*options))
    assert by_helm.keys() == by_kustomize.keys()
    for key, expected in by_kustomize.items():
        assert by_helm[key] == expected, key
    assert len(by_helm) >= 25


def test_sidecars_of_chart_and_kustomize_are_the_same(helm: Helm) -> None:
    component = yaml.safe_load((MANIFESTS / "components/sidecar/sidecar.yaml").read_text())["spec"]["template"]["spec"]
    values = yaml.safe_load((CHART / "ci/everything-values.yaml").read_text())["pools"]["vllm"]
    sidecar = {"poolDefaults__resources": values["resources"], "pools__default__sidecar": values["sidecar"]}
    objects = alike(helm.template(*setting(image__tag="dev", **sidecar)))
    pod = objects["Deployment", "inference", "evenhand-engine"]["spec"]["template"]["spec"]
    [expected], [found] = component["initContainers"], pod["initContainers"]
    of_pod = {"runAsNonRoot", "runAsUser", "runAsGroup", "seccompProfile"}
    for member in expected.keys() - {"securityContext", "volumeMounts"}:
        assert found[member] == expected[member], member
    both = pod["securityContext"] | found["securityContext"]
    assert {key: both[key] for key in expected["securityContext"]} == expected["securityContext"]
    assert of_pod <= pod["securityContext"].keys(), "the engine beside it has them too"
    mounted = {each["mountPath"]: each["name"] for each in found["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    for mount in expected["volumeMounts"]:
        assert f"evenhand-{mounted[mount['mountPath']]}" == mount["name"]
    bootstrap, *_ = component["volumes"]
    assert volumes["bootstrap"]["projected"]["sources"] == bootstrap["projected"]["sources"]
    [engine] = pod["containers"]
    assert engine["lifecycle"] == {"preStop": {"httpGet": {"path": "/drained", "port": 9000}}}
    assert pod["terminationGracePeriodSeconds"] == component["terminationGracePeriodSeconds"]
    network = objects["NetworkPolicy", "inference", "evenhand-engine"]["spec"]
    assert network["policyTypes"] == ["Ingress"], "whom another engine calls is not ours to say"


def test_both_charts_are_sound(helm: Helm) -> None:
    for values in ([], *(["-f", path] for path in (CHART / "ci").iterdir())):
        assert "0 chart(s) failed" in helm("lint", "--strict", CHART, *values)
    assert "0 chart(s) failed" in helm("lint", "--strict", CRDS_CHART)


@pytest.mark.parametrize("keep", [True, False])
def test_kinds_have_a_chart_of_their_own(helm: Helm, tmp_path: Path, keep: bool) -> None:
    """Helm never upgrades what is in a chart's crds/, and refuses a chart whose templates have a kind and an object of it."""
    rendered = helm.template(*setting(keep=keep), chart=CRDS_CHART)
    marks = [each["metadata"]["annotations"].get("helm.sh/resource-policy") for each in rendered]
    assert marks == ["keep" if keep else None] * 2
    by_kustomize = [
        yaml.safe_load(path.read_text()) for path in sorted((MANIFESTS.parent / "crds").glob("evenhand.dev_*.yaml"))
    ]
    for expected in by_kustomize:
        expected["metadata"]["annotations"] = {WAVE: "-2"}
    assert alike(rendered) == alike(by_kustomize)
