"""Who may claim an identity or a key, and whom a gateway's headers are believed."""

from typing import Any

import pytest

from .build import Build, api_key, compiled, header, refusals, service_account, sha256, tenant_ids
from .conftest import KEY_A, KEY_B


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


def test_an_account_is_claimed_once_whatever_its_uid(policy: Build, pool: Build) -> None:
    """Else who claims the one of today could be freed of what somebody decided about its name."""
    uid = "0f7cdb7e-4b5a-4f4e-8f52-3f7d2f1d9c11"
    first = policy("first", identities=[service_account("web", uid=uid)])
    second = policy("second", identities=[service_account("web")])
    third = policy("third", identities=[service_account("web", uid=uid[:-1] + "2")])
    result = compiled([first, second, third], pool())
    assert refusals(result) == [
        (name, "IdentityConflicted", "spec.identities[0].serviceAccount") for name in ("second", "third")
    ]
    [tenant] = result.config.tenants
    assert tenant.service_accounts == (f"system:serviceaccount:inference:web#{uid}",)


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
