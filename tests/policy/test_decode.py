"""decode: what is accepted, and in which words the rest is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from evenhand_policy.decode import decode, decode_stored
from evenhand_policy.errors import InvalidResourceError
from evenhand_policy.pool import EnginePool
from evenhand_policy.schema import Model
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy
from harness.builders import make_pool

Build = Callable[..., dict[str, Any]]

API_KEY = {"name": "k", "type": "APIKey", "apiKey": {"secretRef": {"name": "keys"}}}
TYPE_RULE = (
    "set exactly the member that type names: apiKey for APIKey, serviceAccount for ServiceAccount, "
    "serviceAccountNamespace for ServiceAccountNamespace, header for Header"
)
TOKEN_RULE = (
    "maxPromptTokens and maxOutputTokens together must not exceed tokensPerMinute: the largest request that they permit "
    "could never be admitted"
)
DEFAULT_RULE = (
    "the tenant name default is that of all requests without a policy: choose another name, or set unknownTenants of the "
    "EnginePool"
)
DNS_LABEL = "expected a name of at most 63 lower-case letters, digits and inner dashes"


def refusal(obj: Any, resource_type: type[Model]) -> tuple[str, str]:
    with pytest.raises(InvalidResourceError) as caught:
        decode(obj, resource_type)
    return caught.value.problem.path, caught.value.problem.message


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ({"weigth": 4}, "spec.weigth", "unknown field; did you mean `weight`?"),
        ({"kvcache": {}}, "spec.kvcache", "unknown field; did you mean `kvCache`?"),
        ({"kvCache": {"zzz": 1}}, "spec.kvCache.zzz", "unknown field; known fields are guaranteedPercent, maxPercent, "
         "prefixSharingGroup"),
        ({"zzz": None}, "spec.zzz", "unknown field; known fields are poolRef, tenant, weight, latencyClass, slo, identities, "
         "limits, kvCache, fairness, enforcement, suspend"),
        ({"weight": 0}, "spec.weight", "expected an integer from 1 to 1000"),
        ({"weight": 1001}, "spec.weight", "expected an integer from 1 to 1000"),
        ({"weight": "4"}, "spec.weight", "expected an integer from 1 to 1000"),
        ({"weight": 1.5}, "spec.weight", "expected an integer from 1 to 1000"),
        ({"weight": True}, "spec.weight", "expected an integer from 1 to 1000"),
        ({"suspend": "yes"}, "spec.suspend", "expected `bool`, got `str`"),
        ({"latencyClass": "interactive"}, "spec.latencyClass", "expected one of Interactive, Standard, Batch"),
        ({"tenant": "a\n"}, "spec.tenant", "expected a name of at most 253 lower-case letters, digits, inner dashes and dots"),
        ({"tenant": "default"}, "", DEFAULT_RULE),
        ({"slo": {"timeToFirstToken": 500}}, "spec.slo.timeToFirstToken", "expected a duration such as 500ms, 60s or 1m30s"),
        ({"slo": {"timeToFirstToken": "1.5s"}}, "spec.slo.timeToFirstToken",
         "expected a duration such as 500ms, 60s or 1m30s"),
        ({"slo": {"timeToFirstToken": "60m1ms"}}, "spec.slo", "timeToFirstToken must be between 1ms and 1h"),
        ({"slo": {"interTokenLatency": "0s"}}, "spec.slo", "interTokenLatency must be between 1ms and 1m"),
        ({"limits": {"queueTimeout": "25h"}}, "spec.limits", "queueTimeout must be between 1ms and 24h"),
        ({"limits": {"tokensPerMinute": 9, "maxPromptTokens": 6, "maxOutputTokens": 4}}, "spec.limits", TOKEN_RULE),
        ({"limits": {"tokensPerMinute": 5, "maxPromptTokens": 6}}, "spec.limits", TOKEN_RULE),
        ({"kvCache": {"guaranteedPercent": 51, "maxPercent": 50}}, "spec.kvCache",
         "guaranteedPercent must not exceed maxPercent"),
        ({"kvCache": {"prefixSharingGroup": "A"}}, "spec.kvCache.prefixSharingGroup", DNS_LABEL),
        ({"identities": [API_KEY, API_KEY]}, "spec", "every name in identities must be unique"),
        ({"identities": [{"type": "Header"}]}, "spec.identities[0]", "the field `name` is missing"),
        ({"identities": [API_KEY, {**API_KEY, "name": "b", "type": "Header"}]}, "spec.identities[1]", TYPE_RULE),
        ({"identities": [{**API_KEY, "header": {"value": "v"}}]}, "spec.identities[0]", TYPE_RULE),
        ({"identities": [{"name": "a", "type": "Header", "header": {"value": "two words"}}]},
         "spec.identities[0].header.value", "expected 1 to 253 visible ASCII characters without spaces"),
        (None, "", "the field `spec` is missing"),
        ([], "spec", "expected `object`, got `array`"),
    ],
)  # fmt: skip
def test_a_refusal_says_where_and_what_to_do(policy: Build, spec: Any, path: str, message: str) -> None:
    assert refusal({**policy(), "spec": spec}, TenantPolicy) == (path, message)


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ({"selector": {}}, "spec", "selector must not be empty: it would select every pod of the namespace"),
        ({"allowedNamespaces": {"from": "Selector"}}, "spec.allowedNamespaces", "set selector if and only if from is Selector"),
        ({"allowedNamespaces": {"selector": {}}}, "spec.allowedNamespaces", "set selector if and only if from is Selector"),
        ({"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}, "spec.selector.matchExpressions[0]",
         "give values if and only if operator is In or NotIn"),
        ({"selector": {"matchLabels": {"a": "b c"}}}, "spec.selector.matchLabels",
         "expected a label value of at most 63 characters"),
        ({"unknownTenants": {"action": "Refuse"}}, "spec.unknownTenants.action", "expected one of Share, Reject"),
        ({"prices": {"outputToken": 0}}, "spec.prices.outputToken", "expected an integer from 1 to 1000"),
        ({"gateway": {"tenantHeader": "X-Tenant", "apiKeys": {"secretRef": {"name": "a"}}}}, "spec.gateway.tenantHeader",
         "expected the name of an HTTP header in lower case"),
    ],
)  # fmt: skip
def test_a_pool_is_held_to_its_rules(pool: Build, spec: Any, path: str, message: str) -> None:
    assert refusal(pool(**spec), EnginePool) == (path, message)


def test_a_foreign_version_is_refused(policy: Build) -> None:
    obj = {**policy(), "apiVersion": "evenhand.dev/v2"}
    assert refusal(obj, TenantPolicy) == ("apiVersion", "expected evenhand.dev/v1alpha1")


def test_null_is_a_field_that_is_not_set(policy: Build) -> None:
    nulls = policy(weight=None, slo=None, limits={"queueTimeout": None}, identities=[{**API_KEY, "header": None}])
    assert decode(nulls, TenantPolicy) == decode(policy(limits={}, identities=[API_KEY]), TenantPolicy)


def test_an_integral_number_is_an_integer(policy: Build) -> None:
    assert decode(policy(weight=4.0), TenantPolicy) == decode(policy(weight=4), TenantPolicy)


@pytest.mark.parametrize(
    "spec",
    [
        {"limits": {"tokensPerMinute": 10, "maxPromptTokens": 6, "maxOutputTokens": 4}},
        {"kvCache": {"guaranteedPercent": 50, "maxPercent": 50}},
        {"slo": {"timeToFirstToken": "1h", "interTokenLatency": "60s"}, "limits": {"queueTimeout": "1ms"}},
        {"slo": {"timeToFirstToken": "1ms", "interTokenLatency": "1ms"}, "limits": {"queueTimeout": "24h"}},
        {"weight": 1000, "tenant": "a.b-c", "suspend": True},
    ],
)
def test_bounds_are_inclusive(policy: Build, spec: Any) -> None:
    decode(policy(**spec), TenantPolicy)


def test_what_the_api_server_adds_is_not_in_the_way(policy: Build) -> None:
    obj = policy()
    obj["metadata"] |= {"resourceVersion": "7", "managedFields": [{}], "labels": {"a": "b"}, "finalizers": ["x"]}
    obj["status"] = {"conditions": [{"type": "Future", "anything": 1}], "new": {}}
    assert decode(obj, TenantPolicy).metadata.uid == "uid-chatbot"


@pytest.mark.parametrize("obj", [None, 1, [], "TenantPolicy", {}, {"metadata": 1}, {1: 2}])
def test_what_is_no_object_is_refused(obj: object) -> None:
    assert refusal(obj, TenantPolicy)[1]


def test_a_problem_names_the_object(policy: Build) -> None:
    with pytest.raises(InvalidResourceError) as caught:
        decode(policy(weight=0), TenantPolicy)
    assert str(caught.value) == (
        "TenantPolicy inference/chatbot: spec.weight: expected an integer from 1 to 1000 (Invalid)"
    )


def test_a_secret_is_read_as_the_api_server_reads_it(secret: Build) -> None:
    obj = {**secret("keys", b="plain", c="wins"), "data": {"a": "a2V5\n", "c": "bG9zZXM="}}
    assert decode(obj, Secret).values == {"a": b"key", "b": b"plain", "c": b"wins"}


def test_a_secret_never_shows_what_it_holds(secret: Build) -> None:
    held = decode(secret("keys", a="hunter2"), Secret)
    assert "hunter2" not in f"{held} {held!r} {[held]}"
    path, message = refusal({**secret("keys"), "data": {"a": "hunter2!"}}, Secret)
    assert message == "data.a is not base64; write plain text under stringData"
    assert path == ""


def test_stored_object_of_a_newer_schema_is_read_but_for_what_only_that_knows(policy: Build) -> None:
    """CRDs are upgraded first, and a new default is in every object at once."""
    limits = {"requestsPerMinute": 5, "requestsPerDay": 9}
    identities = [API_KEY | {"expires": {"after": "1h"}}]
    obj = policy(weight=4, limits=limits, identities=identities, colour="red", priority=None)
    assert refusal(obj, TenantPolicy)[1].startswith("unknown field"), "of a file it is a mistake"
    decoded, ignored = decode_stored(obj, TenantPolicy)
    assert ignored == ("spec.limits.requestsPerDay", "spec.identities[0].expires", "spec.colour", "spec.priority")
    known = policy(weight=4, limits={"requestsPerMinute": 5}, identities=[API_KEY])
    assert decoded == decode(known, TenantPolicy)


def test_stored_value_that_only_a_newer_version_knows_is_left_out_where_that_lets_nobody_in(policy: Build) -> None:
    """After a rollback of the operator its tenants go on, with what it knows of them."""
    newer = {"name": "mesh", "type": "SPIFFE", "spiffe": {"id": "a"}}
    obj = policy(weight=4, latencyClass="Realtime", fairness="PerModel", identities=[API_KEY, newer])
    assert refusal(obj, TenantPolicy)[0] in {"spec.latencyClass", "spec.fairness", "spec.identities[1].type"}
    decoded, ignored = decode_stored(obj, TenantPolicy)
    assert set(ignored) == {"spec.latencyClass", "spec.fairness", "spec.identities[1]"}
    assert decoded == decode(policy(weight=4, identities=[API_KEY]), TenantPolicy)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"unknownTenants": {"action": "Queue"}}, "spec.unknownTenants.action"),
        (
            {
                "allowedNamespaces": {
                    "from": "Selector",
                    "selector": {"matchExpressions": [{"key": "a", "operator": "Gt"}]},
                }
            },
            "spec.allowedNamespaces.selector.matchExpressions[0].operator",
        ),
    ],
)
def test_value_without_which_more_would_be_let_in_is_not_left_out(spec: dict[str, Any], path: str) -> None:
    obj = make_pool(**spec)
    with pytest.raises(InvalidResourceError) as caught:
        decode_stored(obj, EnginePool)
    assert caught.value.problem.path == path


def test_stored_object_of_our_schema_is_read_whole(policy: Build) -> None:
    assert decode_stored(policy(weight=4), TenantPolicy) == (decode(policy(weight=4), TenantPolicy), ())


def test_what_is_known_of_a_stored_object_has_to_fit(policy: Build) -> None:
    with pytest.raises(InvalidResourceError) as caught:
        decode_stored(policy(weight=0, colour="red"), TenantPolicy)
    assert caught.value.problem.path == "spec.weight"
