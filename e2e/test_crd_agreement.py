"""A real API server accepts exactly the objects that `evenhand_policy` accepts, and they mean the same to both."""

import http.client
import json
import re
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cluster.client import Object
from cluster.control_plane import ControlPlane
from evenhand_policy.decode import decode
from evenhand_policy.errors import InvalidResourceError
from harness.generated_specs import KINDS, specs
from schema.crd import engine_pool_crd, tenant_policy_crd

Answer = tuple[int, Any]


class Resources:
    """One keep-alive connection to the API server, for the many dry runs of a property test."""

    def __init__(self, cluster: ControlPlane) -> None:
        context = ssl.create_default_context(cafile=str(cluster.authority))
        context.load_cert_chain(cluster.directory / "admin.crt", cluster.directory / "admin.key")
        self._connection = http.client.HTTPSConnection(cluster.server.removeprefix("https://"), context=context)

    def create(self, plural: str, obj: Object, *, dry_run: bool = True) -> Answer:
        """Status and body of creating the object, strictly validated."""
        path = f"/apis/evenhand.dev/v1alpha1/namespaces/default/{plural}?fieldValidation=Strict"
        return self._send("POST", path + ("&dryRun=All" if dry_run else ""), obj)

    def _send(self, method: str, path: str, body: Object) -> Answer:
        self._connection.request(method, path, json.dumps(as_kubectl_sends(body)), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def close(self) -> None:
        self._connection.close()


def as_kubectl_sends(value: Any) -> Any:
    """The value with 4 for 4.0, as it is after kubectl has read it from YAML."""
    if isinstance(value, dict):
        return {key: as_kubectl_sends(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_kubectl_sends(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.fixture(scope="module")
def resources(cluster: ControlPlane, crds: None) -> Iterator[Resources]:
    resources = Resources(cluster)
    yield resources
    resources.close()


def resource(kind: str, spec: Any, name: str = "chatbot") -> Object:
    return {"apiVersion": "evenhand.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def check_agreement(resources: Resources, kind: str, obj: Object) -> bool:
    """Whether both sides accept the object; fails where they differ, or where defaults make it mean something else."""
    plural, resource_type, _ = KINDS[kind]
    status, answer = resources.create(plural, obj)
    assert status in (201, 400, 422), answer
    try:
        ours = decode(obj, resource_type)
    except InvalidResourceError as error:
        assert status != 201, f"the API server accepts what we refuse: {error}"
        return False
    assert status == 201, f"the API server refuses what we accept: {answer['message']}"
    assert decode(answer, resource_type).spec == ours.spec
    return True


AGREEMENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=300, derandomize=True, **AGREEMENT)
@given(data=st.data())
def test_both_sides_agree_on_generated_objects(resources: Resources, kind: str, data: st.DataObject) -> None:
    event("accepted" if check_agreement(resources, kind, resource(kind, data.draw(specs(kind)))) else "refused")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=10_000, **AGREEMENT)
@given(data=st.data())
def test_both_sides_agree_on_very_many_objects(resources: Resources, kind: str, data: st.DataObject) -> None:
    check_agreement(resources, kind, resource(kind, data.draw(specs(kind))))


SELECTOR = {"matchLabels": {"app": "engine"}}
BROKEN_RULES: list[tuple[str, Any, str]] = [
    ("TenantPolicy", {"slo": {"timeToFirstToken": "61m"}}, "timeToFirstToken must be between 1ms and 1h"),
    ("TenantPolicy", {"slo": {"interTokenLatency": "0ms"}}, "interTokenLatency must be between 1ms and 1m"),
    ("TenantPolicy", {"limits": {"queueTimeout": "24h1ms"}}, "queueTimeout must be between 1ms and 24h"),
    (
        "TenantPolicy",
        {"limits": {"tokensPerMinute": 10, "maxPromptTokens": 6, "maxOutputTokens": 5}},
        "maxPromptTokens and maxOutputTokens together must not exceed tokensPerMinute",
    ),
    ("TenantPolicy", {"kvCache": {"guaranteedPercent": 2, "maxPercent": 1}}, "guaranteedPercent must not exceed"),
    (
        "TenantPolicy",
        {"identities": [{"name": "a", "type": "Header", "apiKey": {"secretRef": {"name": "keys"}}}]},
        "set exactly the member that type names",
    ),
    (
        "TenantPolicy",
        {"identities": [{"name": "a", "type": "Header", "header": {"value": "v"}, "serviceAccount": {"name": "w"}}]},
        "set exactly the member that type names",
    ),
    ("TenantPolicy", {"identities": [{"name": "a", "type": "Header"}]}, "set exactly the member that type names"),
    ("TenantPolicy", {"identities": [{"name": "a", "type": "APIKey"}]}, "set exactly the member that type names"),
    (
        "TenantPolicy",
        {"identities": [{"name": "a", "type": "ServiceAccount"}]},
        "set exactly the member that type names",
    ),
    ("TenantPolicy", {"tenant": "default"}, "the tenant name default is that of all requests without a policy"),
    ("EnginePool", {"selector": {}}, "selector must not be empty"),
    ("EnginePool", {"selector": SELECTOR, "allowedNamespaces": {"from": "Selector"}}, "set selector if and only if"),
    (
        "EnginePool",
        {"selector": SELECTOR, "grants": [{"namespaces": {}, "minInterTokenLatency": "61s"}]},
        "minInterTokenLatency must be between 1ms and 1m",
    ),
    (
        "EnginePool",
        {"selector": SELECTOR, "serviceAccountTokens": {"maxAge": "59s"}},
        "maxAge must be between 1m and 8760h",
    ),
    (
        "EnginePool",
        {"selector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}},
        "give values if and only if",
    ),
]


@pytest.mark.parametrize(
    "spec",
    [
        {"limits": {"tokensPerMinute": 10, "maxPromptTokens": 6, "maxOutputTokens": 4}},
        {"kvCache": {"guaranteedPercent": 50, "maxPercent": 50}},
        {"slo": {"timeToFirstToken": "1h", "interTokenLatency": "60s"}, "limits": {"queueTimeout": "1ms"}},
        {"slo": {"timeToFirstToken": "1ms", "interTokenLatency": "1ms"}, "limits": {"queueTimeout": "24h"}},
    ],
)
def test_what_is_just_within_a_rule_is_accepted(resources: Resources, spec: Any) -> None:
    assert check_agreement(resources, "TenantPolicy", resource("TenantPolicy", spec))


@pytest.mark.parametrize(("kind", "spec", "message"), BROKEN_RULES)
def test_a_broken_rule_is_told_in_the_same_words(resources: Resources, kind: str, spec: Any, message: str) -> None:
    plural, resource_type, _ = KINDS[kind]
    status, answer = resources.create(plural, resource(kind, spec))
    assert status == 422
    assert message in answer["message"]
    with pytest.raises(InvalidResourceError, match=re.escape(message)):
        decode(resource(kind, spec), resource_type)


def rules_of(crd: Any) -> list[str]:
    """Messages of all CEL rules in a schema."""
    if isinstance(crd, dict):
        own = [rule["message"] for rule in crd.get("x-kubernetes-validations", [])]
        return own + [rule for value in crd.values() for rule in rules_of(value)]
    return [rule for item in crd for rule in rules_of(item)] if isinstance(crd, list) else []


def test_every_rule_is_broken_by_some_test() -> None:
    elsewhere = ("immutable", "the name of an EnginePool")  # tests of their own
    rules = rules_of([tenant_policy_crd(), engine_pool_crd()])
    told = {rule for rule in rules if not any(message in rule for message in elsewhere)}
    assert {rule for rule in told if any(message in rule for _, _, message in BROKEN_RULES)} == told


@pytest.mark.parametrize("name", ["a", "a" * 63, "a-1"])
def test_the_name_of_a_pool_fits_into_labels_and_names_of_secrets(resources: Resources, name: str) -> None:
    assert check_agreement(resources, "EnginePool", resource("EnginePool", {"selector": SELECTOR}, name=name))


@pytest.mark.parametrize("name", ["a" * 64, "a.b", "a" * 62 + ".b", "a" * 253])
def test_a_pool_whose_secrets_could_not_be_named_is_refused(resources: Resources, name: str) -> None:
    obj = resource("EnginePool", {"selector": SELECTOR}, name=name)
    assert not check_agreement(resources, "EnginePool", obj)
    assert "at most 63 lower-case letters" in resources.create("enginepools", obj)[1]["message"]


def test_the_default_tenant_cannot_be_taken_by_the_name_of_a_policy(resources: Resources) -> None:
    assert not check_agreement(resources, "TenantPolicy", resource("TenantPolicy", {}, name="default"))
    assert check_agreement(resources, "TenantPolicy", resource("TenantPolicy", {"tenant": "web"}, name="default"))
