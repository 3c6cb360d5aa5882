"""compile_policies: who wins, what is refused and why, and what an engine is told."""

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from evenhand_policy.compile import Compilation, compile_policies
from evenhand_policy.decode import decode
from evenhand_policy.pool import EnginePool
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy

Build = Callable[..., dict[str, Any]]

KEY_A = "a-key-that-nobody-can-guess-0001"
KEY_B = "a-key-that-nobody-can-guess-0002"


def sha256(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def compiled(policies: list[Any], pool: Any = None, secrets: list[Any] | None = None, **labels: Any) -> Compilation:
    held = [decode(item, Secret) for item in secrets or []]
    return compile_policies(
        [decode(item, TenantPolicy) for item in policies],
        decode(pool, EnginePool) if pool else None,
        {(item.metadata.namespace, item.metadata.name): item for item in held},
        **labels,
    )


def refusals(compilation: Compilation) -> list[tuple[str, str, str]]:
    return [(problem.resource.name, problem.reason.value, problem.path) for problem in compilation.problems]


def tenant_ids(compilation: Compilation) -> list[str]:
    return [tenant.tenant_id for tenant in compilation.config.tenants]


def api_key(name: str, secret: str) -> dict[str, Any]:
    return {"name": name, "type": "APIKey", "apiKey": {"secretRef": {"name": secret}}}


def header(value: str) -> dict[str, Any]:
    return {"name": "gw", "type": "Header", "header": {"value": value}}


def service_account(name: str, namespace: str | None = None) -> dict[str, Any]:
    account = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"name": "web", "type": "ServiceAccount", "serviceAccount": account}


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


@pytest.mark.parametrize(
    ("identity", "path"),
    [
        (header("v"), "spec.identities[0].header.value"),
        (service_account("frontend"), "spec.identities[0].serviceAccount"),
        (api_key("k", "keys"), "spec.identities[0].apiKey.secretRef.name"),
    ],
)
def test_an_identity_has_one_claimant(policy: Build, secret: Build, identity: dict[str, Any], path: str) -> None:
    policies = [policy("old", age=2, identities=[identity]), policy("young", age=1, identities=[identity])]
    result = compiled(policies, secrets=[secret("keys", a=KEY_A)])
    assert refusals(result) == [("young", "IdentityConflicted", path)]


def test_the_same_key_in_two_secrets_is_one_key(policy: Build, secret: Build) -> None:
    old = policy("old", age=2, identities=[api_key("k", "one")])
    young = policy("young", age=1, identities=[api_key("k", "two")])
    result = compiled([old, young], secrets=[secret("one", a=KEY_A), secret("two", b=KEY_B, c=KEY_A + "\n")])
    assert refusals(result) == [("young", "IdentityConflicted", "spec.identities[0].apiKey.secretRef.name")]
    assert "the key under c of Secret two" in result.problems[0].message


def test_a_tenant_cannot_pass_for_the_gateway(policy: Build, pool: Build, secret: Build) -> None:
    thief = policy(identities=[api_key("k", "copied")])
    engines = pool(gateway={"apiKeys": {"secretRef": {"name": "gateway-key"}}})
    result = compiled([thief], engines, [secret("copied", a=KEY_A), secret("gateway-key", a=KEY_A)])
    assert refusals(result) == [("chatbot", "IdentityConflicted", "spec.identities[0].apiKey.secretRef.name")]
    assert result.config.gateway.key_hashes == (sha256(KEY_A),)


def test_a_policy_may_repeat_its_own_identity(policy: Build) -> None:
    twice = [header("v"), {**header("v"), "name": "again"}]
    (tenant,) = compiled([policy(identities=twice)]).config.tenants
    assert tenant.header_values == ("v",)


def test_a_refused_policy_claims_nothing(policy: Build) -> None:
    lost = policy("lost", age=3, tenant="x", identities=[api_key("k", "missing"), header("v")])
    result = compiled([lost, policy("heir", age=2, tenant="x", identities=[header("v")], kvCache={})])
    assert refusals(result) == [("lost", "SecretNotFound", "spec.identities[0].apiKey.secretRef.name")]
    assert tenant_ids(result) == ["x"]


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


def test_every_value_of_a_secret_is_a_key(policy: Build, secret: Build) -> None:
    keys = {f"k{index}": "k" * 24 + str(index) for index in range(64)}
    config, problems = compiled([policy(identities=[api_key("k", "keys")])], secrets=[secret("keys", **keys)])
    assert not problems
    assert config.tenants[0].key_hashes == tuple(sorted(map(sha256, keys.values())))


def test_a_key_of_24_characters_is_long_enough(policy: Build, secret: Build) -> None:
    assert not compiled([policy(identities=[api_key("k", "keys")])], secrets=[secret("keys", a="k" * 24)]).problems


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("k" * 23, "WeakKey"),
        ("k" * 23 + "\n\n", "WeakKey"),
        ("", "WeakKey"),
        ("k" * 24 + " " + "k", "Invalid"),
        ("é" * 24, "Invalid"),
        ("k" * 1025, "Invalid"),
    ],
)
def test_a_bad_key_refuses_the_policy_and_is_not_told(policy: Build, secret: Build, value: str, reason: str) -> None:
    result = compiled([policy(identities=[api_key("k", "keys")])], secrets=[secret("keys", good=KEY_A, bad=value)])
    assert refusals(result) == [("chatbot", reason, "spec.identities[0].apiKey.secretRef.name")]
    assert "the key under bad of Secret keys" in result.problems[0].message
    assert not value or value.strip() not in result.problems[0].message


def test_a_secret_is_looked_for_beside_the_policy_only(policy: Build, secret: Build) -> None:
    result = compiled([policy(identities=[api_key("k", "keys")])], secrets=[secret("keys", namespace="other", a=KEY_A)])
    assert refusals(result) == [("chatbot", "SecretNotFound", "spec.identities[0].apiKey.secretRef.name")]


@pytest.mark.parametrize("count", [0, 65])
def test_a_secret_without_keys_or_with_too_many_is_refused(policy: Build, secret: Build, count: int) -> None:
    keys = {f"k{index}": f"{KEY_A}-{index}" for index in range(count)}
    result = compiled([policy(identities=[api_key("k", "keys")])], secrets=[secret("keys", **keys)])
    assert [reason for _, reason, _ in refusals(result)] == ["Invalid" if count else "SecretNotFound"]


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


def test_a_guest_cannot_claim_another_namespaces_service_account(policy: Build, pool: Build) -> None:
    engines = pool(allowedNamespaces={"from": "All"})
    reference = {"namespace": "inference"}
    own = policy("own", namespace="guest", poolRef=reference, identities=[service_account("frontend")])
    foreign = policy("foreign", namespace="guest", poolRef=reference, identities=[service_account("api", "victim")])
    home = policy("home", identities=[service_account("worker", "victim")])
    result = compiled([own, foreign, home], engines)
    assert refusals(result) == [("foreign", "NotAllowed", "spec.identities[0].serviceAccount.namespace")]
    accounts = {tenant.tenant_id: tenant.service_accounts for tenant in result.config.tenants}
    assert accounts == {
        "home": ("system:serviceaccount:victim:worker",),
        "guest/own": ("system:serviceaccount:guest:frontend",),
    }


def test_a_gateway_without_its_secret_is_not_believed(policy: Build, pool: Build) -> None:
    result = compiled([policy()], pool(gateway={"apiKeys": {"secretRef": {"name": "gateway-key"}}}))
    assert refusals(result) == [("default", "SecretNotFound", "spec.gateway.apiKeys.secretRef.name")]
    assert result.config.gateway.key_hashes == ()
    assert tenant_ids(result) == ["chatbot"]


@pytest.mark.parametrize(
    ("spec", "headers"),
    [
        ({}, ("x-evenhand-tenant",)),
        ({"tenantHeader": "x-a"}, ("x-a",)),
        ({"tenantHeaders": ["x-a"]}, ("x-a",)),
        ({"tenantHeaders": ["x-b", "x-a"]}, ("x-b", "x-a")),
        ({"tenantHeaders": ["x-b", "x-a"], "tenantHeader": "x-evenhand-tenant"}, ("x-b", "x-a")),
    ],
)
def test_headers_of_the_gateway(pool: Build, spec: dict[str, Any], headers: tuple[str, ...]) -> None:
    gateway = compiled([], pool(gateway={"apiKeys": {"secretRef": {"name": "gateway-key"}}} | spec)).config.gateway
    assert gateway.headers == headers
    assert gateway.tenant_header == headers[0], "what an engine looks at that knows one header only"
