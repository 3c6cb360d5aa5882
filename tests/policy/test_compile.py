"""What policies become together: tenants, defaults, order, guarantees, namespaces."""

from typing import Any

import msgspec
import pytest

from .build import Build, api_key, compiled, header, refusals, service_account, sha256, tenant_ids
from .conftest import KEY_A, KEY_B


def test_a_full_policy_becomes_the_document_of_the_design(policy: Build, pool: Build, secret: Build) -> None:
    chatbot = policy(
        poolRef={"name": "default"},
        tenant="chatbot",
        weight=4,
        latencyClass="Interactive",
        slo={"timeToFirstToken": "500ms", "interTokenLatency": "50ms"},
        identities=[api_key("keys", "chatbot-keys"), service_account("frontend", "chat"), header("chatbot")],
        limits={
            "requestsPerMinute": 600,
            "tokensPerMinute": 2000000,
            "maxConcurrentRequests": 64,
            "maxQueuedRequests": 256,
            "maxPromptTokens": 32768,
            "maxOutputTokens": 4096,
            "queueTimeout": "1m",
        },
        kvCache={"guaranteedPercent": 25, "maxPercent": 80, "prefixSharingGroup": "web"},
        fairness="PerUser",
        enforcement="Audit",
        suspend=True,
    )
    gateway = {"apiKeys": {"secretRef": {"name": "gateway-key"}}, "tenantHeader": "x-tenant"}
    engines = pool(
        prices={"inputToken": 3, "outputToken": 5, "contextToken": 7},
        unknownTenants={"action": "Reject"},
        gateway=gateway,
    )
    secrets = [secret("chatbot-keys", current=KEY_A + "\n"), secret("gateway-key", key=KEY_B)]
    config, problems = compiled([chatbot], engines, secrets)
    assert not problems
    assert msgspec.to_builtins(config) == {
        "schemaVersion": 1,
        "cluster": "",
        "pool": {"namespace": "inference", "name": "default"},
        "prices": {"inputToken": 3, "outputToken": 5, "contextToken": 7},
        "unknownTenants": {"action": "Reject", "weight": 1},
        "gateway": {"keyHashes": (sha256(KEY_B),), "tenantHeader": "x-tenant", "tenantHeaders": ()},
        "serviceAccounts": None,
        "tenants": (
            {
                "tenantId": "chatbot",
                "uid": "uid-chatbot",
                "generation": 1,
                "weight": 4,
                "latencyClass": "Interactive",
                "slo": {"timeToFirstTokenMs": 500, "interTokenLatencyMs": 50},
                "keyHashes": (sha256(KEY_A),),
                "serviceAccounts": ("system:serviceaccount:chat:frontend",),
                "headerValues": ("chatbot",),
                "limits": {
                    "requestsPerMinute": 600,
                    "tokensPerMinute": 2000000,
                    "maxConcurrentRequests": 64,
                    "maxQueuedRequests": 256,
                    "maxPromptTokens": 32768,
                    "maxOutputTokens": 4096,
                    "queueTimeoutMs": 60000,
                },
                "kvCache": {"guaranteedPercent": 25, "maxPercent": 80, "prefixSharingGroup": "inference/web"},
                "fairness": "PerUser",
                "enforcement": "Audit",
                "suspended": True,
            },
        ),
    }


def test_an_empty_policy_has_the_defaults(policy: Build) -> None:
    (tenant,) = compiled([policy("batch")]).config.tenants
    assert (tenant.tenant_id, tenant.weight, tenant.latency_class, tenant.fairness) == ("batch", 1, "Standard", "FIFO")
    assert (tenant.kv_cache.guaranteed_percent, tenant.kv_cache.max_percent) == (0, 100)
    assert tenant.enforcement == "Enforce"
    assert not tenant.suspended


@pytest.mark.parametrize(
    ("duration", "expected"), [("1ms", 1), ("1m30s", 90_000), ("1h", 3_600_000), ("1m1ms", 60_001)]
)
def test_durations_become_milliseconds(policy: Build, duration: str, expected: int) -> None:
    (tenant,) = compiled([policy(limits={"queueTimeout": duration})]).config.tenants
    assert tenant.limits.queue_timeout_ms == expected


def test_the_older_policy_has_the_tenant(policy: Build) -> None:
    result = compiled([policy("young", tenant="x", age=1), policy("old", tenant="x", age=2)])
    assert refusals(result) == [("young", "Conflicted", "spec.tenant")]
    assert result.problems[0].claimant is not None
    assert str(result.problems[0].claimant) == "TenantPolicy inference/old"
    assert result.config.tenants[0].uid == "uid-old"


def test_of_the_same_age_the_first_by_namespace_and_name_wins(policy: Build, pool: Build) -> None:
    guest = policy("a", namespace="zoo", tenant="x", age=1, poolRef={"namespace": "inference"})
    result = compiled(
        [guest, policy("b", tenant="x", age=1), policy("c", tenant="x", age=1)],
        pool(allowedNamespaces={"from": "All"}, grants=[{"namespaces": {}, "tenantPrefix": ""}]),
    )
    assert refusals(result) == [("c", "Conflicted", "spec.tenant"), ("a", "Conflicted", "spec.tenant")]


def test_a_policy_without_a_creation_time_is_the_youngest(policy: Build) -> None:
    result = compiled([policy("a", tenant="x"), policy("b", tenant="x", age=1)])
    assert refusals(result) == [("a", "Conflicted", "spec.tenant")]


def test_even_two_objects_of_one_name_have_an_order(policy: Build) -> None:
    twins = [policy(weight=1), policy(weight=2)]
    assert compiled(twins) == compiled(twins[::-1])


def test_the_tenant_name_defaults_to_the_name_of_the_policy(policy: Build) -> None:
    result = compiled([policy("a", age=2), policy("b", tenant="a", age=1)])
    assert refusals(result) == [("b", "Conflicted", "spec.tenant")]


def test_guarantees_are_given_from_the_oldest_on_as_far_as_they_reach(policy: Build) -> None:
    sizes = [("a", 60), ("b", 50), ("c", 40), ("d", 1), ("e", 0)]
    policies = [
        policy(name, age=9 - index, kvCache={"guaranteedPercent": percent})
        for index, (name, percent) in enumerate(sizes)
    ]
    result = compiled(policies)
    path = "spec.kvCache.guaranteedPercent"
    assert refusals(result) == [("b", "GuaranteeOvercommitted", path), ("d", "GuaranteeOvercommitted", path)]
    assert "50 percent" in result.problems[0].message
    assert "40 that" in result.problems[0].message


def test_a_policy_of_another_pool_is_not_compiled(policy: Build, pool: Build) -> None:
    policies = [policy("a", poolRef={"name": "gold"}), policy("b", namespace="other"), policy("c")]
    result = compiled(policies, pool())
    assert refusals(result) == [("a", "PoolNotFound", "spec.poolRef"), ("b", "PoolNotFound", "spec.poolRef")]
    assert tenant_ids(result) == ["c"]


@pytest.mark.parametrize(
    ("allowed", "admitted"),
    [
        ({}, False),
        ({"from": "All"}, True),
        ({"from": "Selector", "selector": {"matchLabels": {"team": "chat"}}}, True),
        ({"from": "Selector", "selector": {"matchLabels": {"team": "web"}}}, False),
        ({"from": "Selector", "selector": {"matchLabels": {"kubernetes.io/metadata.name": "guest"}}}, True),
    ],
)
def test_the_pool_says_which_namespaces_may_use_it(
    policy: Build, pool: Build, allowed: dict[str, Any], admitted: bool
) -> None:
    guest = policy(namespace="guest", poolRef={"namespace": "inference"})
    result = compiled([guest], pool(allowedNamespaces=allowed), namespace_labels={"guest": {"team": "chat"}})
    assert refusals(result) == ([] if admitted else [("chatbot", "NotAllowed", "spec.poolRef")])
