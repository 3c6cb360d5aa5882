"""What the chart makes of its values: names that follow from the pool's, no value unnoticed, none without a meaning."""

import json
import re
from typing import Any

import pytest
import yaml

from harness.helm import CHART, NAMESPACE, Helm, HelmError, Objects, by_name, setting

Object = dict[str, Any]


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
