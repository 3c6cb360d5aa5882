"""Grants: what a guest of a pool may have, and the defaults of its limits."""

from typing import Any

import pytest

from .build import Build, header, refusals
from .guests import ACCOUNT, EVERY, NAMESPACE, compiled, tenants


# ---- without a grant
def test_guest_without_a_grant_is_one_tenant_of_weight_1_under_its_own_name(guest: Build, admitting: Build) -> None:
    result = compiled([guest(latencyClass="Batch", identities=[ACCOUNT])], admitting())
    assert not result.problems
    assert tenants(result) == {"guest/web": 1}
    assert result.config.tenants[0].service_accounts == ("system:serviceaccount:guest:web",)


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ({"weight": 2}, "spec.weight", "weight 2 is above the maxWeight of 1"),
        (
            {"kvCache": {"guaranteedPercent": 1}},
            "spec.kvCache.guaranteedPercent",
            "with this policy guarantees of 1 percent are above the maxGuaranteedPercent of 0",
        ),
        ({"latencyClass": "Interactive"}, "spec.latencyClass", "none of the latencyClasses Standard, Batch"),
        ({"slo": {"interTokenLatency": "1m"}}, "spec.slo.interTokenLatency", "1m is set without any minInterToken"),
        ({"identities": [header("guest/web")]}, "spec.identities[0].type", "Header is none of the identityTypes"),
        ({"identities": [ACCOUNT, NAMESPACE]}, "spec.identities[1].type", "ServiceAccountNamespace is none of the"),
    ],
)
def test_guest_without_a_grant_may_claim_nothing_else(
    guest: Build, admitting: Build, spec: Any, path: str, message: str
) -> None:
    result = compiled([guest(**spec)], admitting())
    assert ("web", "ExceedsGrant", path) in refusals(result)
    told = next(each.message for each in result.problems if each.path == path)
    assert message in told
    assert "which is what EnginePool inference/default grants namespace guest" in told
    assert "ask whoever runs the pool for more (its spec.grants)" in told
    assert tenants(result) == {}


def test_objective_for_the_first_token_buys_no_share_and_needs_no_grant(guest: Build, admitting: Build) -> None:
    assert not compiled([guest(slo={"timeToFirstToken": "1ms"})], admitting()).problems


def test_guest_cannot_take_or_shadow_anothers_name_or_header(policy: Build, guest: Build, admitting: Build) -> None:
    victim = policy("search", identities=[header("search")])
    squatter = guest("search", tenant="search", suspend=True)
    impostor = guest("imp", identities=[header("search")])
    result = compiled([squatter, impostor, victim], admitting())
    assert {each.tenant_id: each.suspended for each in result.config.tenants} == {
        "guest/search": True,
        "search": False,
    }
    assert ("imp", "ExceedsGrant", "spec.identities[0].header.value") in refusals(result)


def test_more_policies_are_no_larger_share(guest: Build, admitting: Build) -> None:
    pair = [guest("a", age=2), guest("b", age=1), guest("c", namespace="other")]
    result = compiled(pair, admitting())
    assert tenants(result) == {"guest/a": 1, "other/c": 1}
    assert refusals(result) == [("b", "ExceedsGrant", "spec.weight")]
    assert "with this policy a total weight of 2 is above the maxTotalWeight of 1" in result.problems[0].message


def test_own_namespace_of_the_pool_is_unrestricted(policy: Build, pool: Build) -> None:
    everything = policy(
        weight=1000,
        latencyClass="Interactive",
        slo={"interTokenLatency": "1ms"},
        kvCache={"guaranteedPercent": 100},
        identities=[header("anything"), {**NAMESPACE, "serviceAccountNamespace": {"namespace": "chat"}}],
    )
    result = compiled([everything, policy("second", weight=1000)], pool(grants=[EVERY]))
    assert not result.problems
    assert tenants(result) == {"chatbot": 1000, "second": 1000}
    assert result.config.tenants[0].service_accounts == ("system:serviceaccounts:chat",)


# ---- with one
def test_grant_widens_every_bound_up_to_its_limit(guest: Build, admitting: Build) -> None:
    grant = {
        "namespaces": {"matchLabels": {"team": "gold"}},
        "maxWeight": 10,
        "maxTotalWeight": 12,
        "maxGuaranteedPercent": 20,
        "latencyClasses": ["Interactive"],
        "minInterTokenLatency": "50ms",
        "identityTypes": ["Header", "ServiceAccountNamespace"],
        "tenantPrefix": "gold-",
    }
    most = guest(
        "gold-a",
        age=5,
        weight=10,
        latencyClass="Interactive",
        slo={"interTokenLatency": "50ms"},
        kvCache={"guaranteedPercent": 20},
        identities=[header("gold-a"), NAMESPACE],
    )
    result = compiled([most], admitting(grant))
    assert not result.problems
    assert tenants(result) == {"gold-a": 10}

    beyond = [
        guest("gold-b", age=4, weight=11, latencyClass="Interactive"),
        guest("gold-c", age=3, weight=3, latencyClass="Interactive"),
        guest("gold-d", age=2, latencyClass="Interactive", kvCache={"guaranteedPercent": 1}),
        guest("gold-e", age=1, latencyClass="Standard"),
        guest("gold-f", latencyClass="Interactive", slo={"interTokenLatency": "49ms"}),
        guest("gold-g", latencyClass="Interactive", identities=[ACCOUNT]),
        guest("gold-h", latencyClass="Interactive", identities=[header("silver")]),
        guest("gold-i", latencyClass="Interactive", tenant="silver"),
        guest("silver", latencyClass="Interactive"),
        guest("gold-z", age=1, weight=2, latencyClass="Interactive"),
    ]
    result = compiled([most, *beyond], admitting(grant))
    assert tenants(result) == {"gold-a": 10, "gold-z": 2}
    assert refusals(result) == [
        ("gold-b", "ExceedsGrant", "spec.weight"),
        ("gold-c", "ExceedsGrant", "spec.weight"),
        ("gold-d", "ExceedsGrant", "spec.kvCache.guaranteedPercent"),
        ("gold-e", "ExceedsGrant", "spec.latencyClass"),
        ("gold-f", "ExceedsGrant", "spec.slo.interTokenLatency"),
        ("gold-g", "ExceedsGrant", "spec.identities[0].type"),
        ("gold-h", "ExceedsGrant", "spec.identities[0].header.value"),
        ("gold-i", "ExceedsGrant", "spec.tenant"),
        ("silver", "ExceedsGrant", "metadata.name"),
    ]


def test_first_grant_that_selects_a_namespace_holds(guest: Build, admitting: Build) -> None:
    grants = [
        {"namespaces": {"matchLabels": {"team": "gold"}}, "maxWeight": 10},
        {"namespaces": {}, "maxWeight": 3},
        {"namespaces": {"matchLabels": {"team": "tin"}}, "maxWeight": 1000},
    ]
    policies = [guest("a", weight=10), guest("b", namespace="other", weight=4)]
    result = compiled(policies, admitting(*grants))
    assert tenants(result) == {"guest/a": 10}
    assert refusals(result) == [("b", "ExceedsGrant", "spec.weight")]


def test_grant_admits_nobody_by_itself(guest: Build, pool: Build) -> None:
    result = compiled([guest()], pool(grants=[EVERY]))
    assert refusals(result) == [("web", "NotAllowed", "spec.poolRef")]


def test_empty_prefix_leaves_names_as_they_are_and_the_older_has_them(
    policy: Build, guest: Build, admitting: Build
) -> None:
    grant = EVERY | {"tenantPrefix": "", "identityTypes": ["Header"]}
    result = compiled([guest("x", age=2, identities=[header("v")]), policy("x", age=1)], admitting(grant))
    assert tenants(result) == {"x": 1}
    assert result.config.tenants[0].header_values == ("v",)
    assert refusals(result) == [("x", "Conflicted", "metadata.name")]


def test_total_is_counted_for_each_namespace_and_of_accepted_policies_only(guest: Build, admitting: Build) -> None:
    policies = [
        guest("a", age=9, weight=9),
        guest("b", age=8, weight=2),
        guest("c", age=7, weight=1),
        guest("d", age=6, namespace="other", weight=10),
    ]
    result = compiled(policies, admitting(EVERY | {"maxWeight": 10}))
    assert tenants(result) == {"guest/a": 9, "guest/c": 1, "other/d": 10}
    assert refusals(result) == [("b", "ExceedsGrant", "spec.weight")]


# ---- defaults of the pool
def test_default_limits_hold_one_by_one_where_the_policy_has_none(policy: Build, pool: Build) -> None:
    defaults = {"limits": {"requestsPerMinute": 60, "maxOutputTokens": 100, "queueTimeout": "1m"}}
    policies = [policy("a"), policy("b", limits={"requestsPerMinute": 6})]
    a, b = compiled(policies, pool(defaults=defaults)).config.tenants
    assert (a.limits.requests_per_minute, a.limits.max_output_tokens, a.limits.queue_timeout_ms) == (60, 100, 60_000)
    assert (b.limits.requests_per_minute, b.limits.max_output_tokens, b.limits.queue_timeout_ms) == (6, 100, 60_000)
    assert a.limits.tokens_per_minute is None


def test_limit_that_contradicts_a_default_is_told(policy: Build, pool: Build) -> None:
    result = compiled([policy(limits={"maxPromptTokens": 11})], pool(defaults={"limits": {"tokensPerMinute": 10}}))
    assert refusals(result) == [("chatbot", "Invalid", "spec.limits")]
    assert result.problems[0].message.startswith("with the default limits of the pool: maxPromptTokens and")
