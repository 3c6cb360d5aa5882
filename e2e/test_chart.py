"""The Helm chart, rendered by Helm itself: the same objects as kustomize's, names that follow from the pool's, no value unnoticed."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.helm import CHART, CRDS_CHART, NAMESPACE, Helm, HelmError, setting
from harness.kustomize import MANIFESTS, render

Object = dict[str, Any]
Objects = dict[tuple[str, str, str], Object]

HELMS_OWN = {"helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/instance", "helm.sh/resource-policy"}
WAVE = "argocd.argoproj.io/sync-wave"


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    return Helm(tmp_path)


def by_name(objects: list[Object]) -> Objects:
    """Each object by kind, namespace and name. Fails where two are one."""
    found = {(each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found


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


def everything(helm: Helm) -> Objects:
    return by_name(helm.template("-f", CHART / "ci/everything-values.yaml"))


def test_everything_of_a_pool_follows_from_its_name(helm: Helm) -> None:
    renamed = helm.template(*setting(pools={"default": None, "gold": {}}))
    text = yaml.safe_dump_all([each for each in renamed if each["metadata"].get("namespace") == "inference"])
    assert re.findall(r"evenhand-engine(?!-gold)\b", text) == []
    assert re.findall(r"evenhand-bootstrap-(?!gold-)", text) == []
    assert text.count("evenhand-bootstrap-gold-") == 9
    assert "--pool=inference/gold" in text
    assert "evenhand.dev/pool: gold" in text
    [pool] = [each for each in renamed if each["kind"] == "EnginePool"]
    assert pool["metadata"]["name"] == "gold"


def test_pools_share_no_pod_and_the_operator_serves_the_namespaces_of_all(helm: Helm) -> None:
    objects = everything(helm)
    deployments = {key[2]: each for key, each in objects.items() if key[0] == "Deployment"}
    operator = deployments.pop("evenhand-operator")
    assert deployments.keys() == {"evenhand-engine-gold", "evenhand-engine-small", "evenhand-engine-vllm"}
    for name, deployment in deployments.items():
        namespace, pool = deployment["metadata"]["namespace"], name.removeprefix("evenhand-engine-")
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        selector = objects["EnginePool", namespace, pool]["spec"]["selector"]
        assert selector == {"matchLabels": {"app": name}} == deployment["spec"]["selector"]
        assert labels.items() >= {"app": name, "evenhand.dev/pool": pool, "team": "platform"}.items()
        for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount", "PodMonitor"):
            assert (kind, namespace, name) in objects
    assert operator["spec"]["template"]["spec"]["containers"][0]["args"][:2] == ["--namespace=llm", "--namespace=small"]
    for namespace in ("llm", "small"):
        assert ("Namespace", "", namespace) in objects
        for role in ("evenhand-operator", "evenhand-operator-pools"):
            assert objects["RoleBinding", namespace, role]["subjects"][0]["namespace"] == NAMESPACE


def pod_of(objects: Objects, namespace: str, name: str) -> tuple[Object, Object]:
    """Spec and container of an engine's Pod."""
    spec = objects["Deployment", namespace, name]["spec"]["template"]["spec"]
    return spec, spec["containers"][0]


def test_engine_on_gpus_has_them_their_image_and_its_model(helm: Helm) -> None:
    objects = everything(helm)
    pod, container = pod_of(objects, "llm", "evenhand-engine-gold")
    assert container["image"] == "registry.example/evenhand/engine:1.2.3-cuda"
    assert container["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": "2"}
    assert container["args"][0] == "/models"
    [fetching] = pod["initContainers"]
    assert {"name": "MODEL", "value": "example/llama"} in fetching["env"]
    assert {"--device=cuda", "--tensor-parallel-size=2", "--max-model-len=8K"} <= set(container["args"])
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes["model"]["persistentVolumeClaim"]["claimName"] == "models"
    assert {"name": "model", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
    assert volumes["cache"].keys() == {"name", "ephemeral"}
    assert pod["runtimeClassName"] == "nvidia"
    assert (
        pod["priorityClassName"]
        == "evenhand-engine"
        == objects["PriorityClass", "", "evenhand-engine"]["metadata"]["name"]
    )
    variables = {each["name"]: each for each in container["env"]}
    for name, key in (("HF_ENDPOINT", "endpoint"), ("HF_TOKEN", "token")):
        assert variables[name]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": key, "optional": True}
    assert objects["NetworkPolicy", "llm", "evenhand-engine-gold"]["spec"]["egress"][0] == {"ports": [{"port": 443}]}
    _, small = pod_of(objects, "small", "evenhand-engine-small")
    assert small["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/mig-1g.10gb": "1"}
    assert not any("tensor-parallel" in each for each in small["args"])


def test_a_pools_volume_or_strategy_takes_the_place_of_the_default_one(helm: Helm) -> None:
    """Merged, as other values are, they would be two at once, which the API server refuses."""
    claim, image = {"persistentVolumeClaim": {"claimName": "models"}}, {"image": {"reference": "models"}}
    defaults = {"modelVolume": claim, "strategy": {"rollingUpdate": {"maxSurge": 1}}}
    pool = {"modelVolume": image, "strategy": {"type": "Recreate"}}
    objects = by_name(helm.template(*setting(poolDefaults=defaults, pools__default=pool)))
    assert objects["Deployment", "inference", "evenhand-engine"]["spec"]["strategy"] == {"type": "Recreate"}
    spec, _ = pod_of(objects, "inference", "evenhand-engine")
    [volume] = [each for each in spec["volumes"] if each["name"] == "model"]
    assert volume == {"name": "model"} | image


def test_times_fit_each_other(helm: Helm) -> None:
    for key, deployment in everything(helm).items():
        if key[0] == "Deployment" and key[2] in ("evenhand-engine-gold", "evenhand-engine-small"):
            spec = deployment["spec"]
            [container] = spec["template"]["spec"]["containers"]
            probe, [drain] = (
                container["startupProbe"],
                [int(each.partition("=")[2]) for each in container["args"] if each.startswith("--drain-timeout=")],
            )
            assert spec["progressDeadlineSeconds"] == probe["periodSeconds"] * probe["failureThreshold"] + 60
            leave = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= leave + drain + 10


def test_certificate_of_cert_manager_is_the_one_that_the_engine_shows(helm: Helm) -> None:
    objects = everything(helm)
    certificate = objects["Certificate", "llm", "evenhand-engine-gold"]["spec"]
    assert "evenhand-engine-gold.llm.svc" in certificate["dnsNames"] and "llm.example" in certificate["dnsNames"]
    assert certificate["issuerRef"] == {"kind": "ClusterIssuer", "name": "internal"}
    pod, container = pod_of(objects, "llm", "evenhand-engine-gold")
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes["tls"]["secret"]["secretName"] == certificate["secretName"]
    [mount] = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "tls"]
    assert {f"--ssl-certfile={mount}/tls.crt", f"--ssl-keyfile={mount}/tls.key"} <= set(container["args"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    yours = by_name(helm.template(*setting(poolDefaults__tls__secretName="mine")))
    assert not [key for key in yours if key[0] == "Certificate"]
    assert "--ssl-certfile=/etc/evenhand/tls/tls.crt" in pod_of(yours, "inference", "evenhand-engine")[1]["args"]


def test_what_scales_a_pool_is_left_its_replicas(helm: Helm) -> None:
    objects = everything(helm)
    hpa = objects["HorizontalPodAutoscaler", "small", "evenhand-engine-small"]["spec"]
    assert hpa["scaleTargetRef"]["name"] == "evenhand-engine-small"
    assert hpa["metrics"][0]["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    keda = objects["ScaledObject", "llm", "evenhand-engine-gold"]["spec"]
    assert keda["scaleTargetRef"] == {"name": "evenhand-engine-gold"}
    for namespace, name in (("small", "evenhand-engine-small"), ("llm", "evenhand-engine-gold")):
        assert "replicas" not in objects["Deployment", namespace, name]["spec"], "an upgrade would set them back"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"pools": {"Gold": {}}}, "'Gold' does not match"),
        ({"pools": {"default": {"replica": 1}}}, "replica"),
        ({"pools__default__device": "tpu"}, "device"),
        ({"pools__default__spec": {"selector": {}}}, "spec"),
        ({"poolDefaults__hub__secret": ""}, "secret"),
        ({"poolDefaults__hub__fetch": "a/b"}, "needs hub.enabled"),
        ({"networkPolicy__tenants": []}, "tenants"),
        ({"operator__replicas": "two"}, "replicas"),
        ({"pool": {}}, "pool"),
        ({"pools__default__hpa__enabled": True, "pools__default__keda__enabled": True}, "one of them scales it"),
        ({"pools__default__sidecar__enabled": True}, "pools.default.sidecar.engine is empty"),
    ],
    ids=json.dumps,
)
def test_values_that_mean_nothing_are_refused(helm: Helm, values: Object, told: str) -> None:
    with pytest.raises(HelmError, match=re.escape(told)):
        helm.template(*setting(**values))


def test_every_default_has_a_place_in_the_schema(helm: Helm) -> None:
    """So that no value is refused which the chart has, and none is in the schema that the chart does not have."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(described: Object, value: Any) -> None:
        described = schema["$defs"]["pool"] if described.get("$ref") else described
        if described.get("additionalProperties") is False and isinstance(value, dict) and value:
            assert described["properties"].keys() - {"global"} == value.keys()
            for name, inner in value.items():
                compare(described["properties"][name], inner)

    compare(schema, values)


def test_every_value_changes_something(helm: Helm) -> None:
    """A value that no template reads is a promise that is not kept."""
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def names(value: Object) -> set[str]:
        inner = [names(each) for each in value.values() if isinstance(each, dict)]
        return set(value).union(*inner)

    free = {"requests", "limits", "cpu", "memory", "ephemeral-storage"}
    free |= {"default", "grafana_dashboard"}
    assert [name for name in sorted(names(values) - free) if not re.search(rf"\.{name}\b", templates)] == []


def test_notes_name_each_pool_and_its_address(helm: Helm) -> None:
    said = helm("install", "x", CHART, "-n", NAMESPACE, "--dry-run=client", "-f", CHART / "ci/everything-values.yaml")
    notes = said.rpartition("NOTES:")[2]
    assert "https://evenhand-engine-gold.llm:8000/v1" in notes
    assert "http://evenhand-engine-small.small:8000/v1" in notes
    assert "serves llm, small." in notes
