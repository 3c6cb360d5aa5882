"""Properties of decode and compile_policies on generated objects, valid and not."""

import copy
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from evenhand_policy.compile import compile_policies
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.decode import decode
from evenhand_policy.errors import InvalidResourceError
from evenhand_policy.grants import NO_GRANT
from evenhand_policy.pool import EnginePool
from evenhand_policy.secret import Secret
from evenhand_policy.spec import TenantPolicy

NAMES = st.sampled_from(["a", "b", "c", "d"])
NAMESPACES = st.sampled_from(["inference", "guest"])
KEYS = st.sampled_from(["k" * 24, "l" * 24, "m" * 30 + "\n", "short", "with space " * 4])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def identities() -> st.SearchStrategy[list[dict[str, Any]]]:
    key = st.builds(lambda name: {"type": "APIKey", "apiKey": {"secretRef": {"name": name}}}, NAMES)
    account = st.builds(
        lambda name, namespace: {"type": "ServiceAccount", "serviceAccount": {"name": name, "namespace": namespace}},
        NAMES,
        NAMESPACES,
    )
    header = st.builds(lambda value: {"type": "Header", "header": {"value": value}}, NAMES)
    entries = st.lists(key | account | header, max_size=3)
    return entries.map(lambda items: [{**item, "name": f"i{index}"} for index, item in enumerate(items)])


def metadata() -> st.SearchStrategy[dict[str, Any]]:
    ages = st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"])
    return st.fixed_dictionaries(
        {"name": NAMES, "namespace": NAMESPACES}, optional={"creationTimestamp": ages, "uid": NAMES}
    )


POLICIES = st.builds(
    lambda metadata, spec: {
        "apiVersion": "evenhand.dev/v1alpha1",
        "kind": "TenantPolicy",
        "metadata": metadata,
        "spec": spec,
    },
    metadata(),
    st.fixed_dictionaries(
        {},
        optional={
            "tenant": NAMES,
            "weight": st.integers(1, 1000),
            "poolRef": st.fixed_dictionaries({}, optional={"namespace": NAMESPACES, "name": st.just("default")}),
            "identities": identities(),
            "kvCache": st.builds(lambda percent: {"guaranteedPercent": percent}, st.integers(0, 100)),
        },
    ),
)
GENEROUS = {
    "namespaces": {},
    "maxWeight": 500,
    "maxTotalWeight": 700,
    "maxGuaranteedPercent": 50,
    "identityTypes": ["APIKey", "Header"],
    "tenantPrefix": "a",
}
POOLS = st.sampled_from(
    [
        {
            "apiVersion": "evenhand.dev/v1alpha1",
            "kind": "EnginePool",
            "metadata": {"name": "default", "namespace": "inference"},
            "spec": {"selector": {"matchLabels": {"app": "x"}}, **more},
        }
        for more in (
            {},
            {"allowedNamespaces": {"from": "All"}},
            {"allowedNamespaces": {"from": "All"}, "gateway": {"apiKeys": {"secretRef": {"name": "a"}}}},
            {"allowedNamespaces": {"from": "All"}, "grants": [{"namespaces": {}, "tenantPrefix": ""}]},
            {"allowedNamespaces": {"from": "All"}, "grants": [GENEROUS]},
        )
    ]
)
SECRETS = st.dictionaries(
    st.tuples(NAMESPACES, NAMES), st.dictionaries(st.sampled_from(["x", "y"]), KEYS, max_size=2), max_size=6
).map(
    lambda held: {
        key: decode(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"namespace": key[0], "name": key[1]},
                "stringData": values,
            },
            Secret,
        )
        for key, values in held.items()
    }
)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), policies=st.lists(POLICIES, max_size=8), pool=st.none() | POOLS, secrets=SECRETS)
def test_the_order_of_policies_does_not_matter(
    data: st.DataObject, policies: list[Any], pool: Any, secrets: dict[tuple[str, str], Secret]
) -> None:
    decoded = [decode(item, TenantPolicy) for item in policies]
    engines = decode(pool, EnginePool) if pool else None
    first = compile_policies(decoded, engines, secrets)
    assert compile_policies(data.draw(st.permutations(decoded)), engines, secrets) == first
    assert (
        first.config.canonical_json()
        == msgspec.json.decode(first.config.canonical_json(), type=SchedulerConfig).canonical_json()
    )


@settings(max_examples=100, deadline=None)
@given(policies=st.lists(POLICIES, max_size=8), pool=st.none() | POOLS, secrets=SECRETS)
def test_every_claim_has_one_claimant_and_every_loser_a_reason(
    policies: list[Any], pool: Any, secrets: dict[tuple[str, str], Secret]
) -> None:
    unique = list({(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in policies}.values())
    decoded = [decode(item, TenantPolicy) for item in unique]
    config, problems = compile_policies(decoded, decode(pool, EnginePool) if pool else None, secrets)
    for claimed in ("key_hashes", "service_accounts", "header_values"):
        values = [value for tenant in config.tenants for value in getattr(tenant, claimed)]
        assert len(values) == len(set(values))
        assert claimed != "key_hashes" or not set(values) & set(config.gateway.key_hashes)
    assert len({tenant.tenant_id for tenant in config.tenants}) == len(config.tenants)
    assert sum(tenant.kv_cache.guaranteed_percent for tenant in config.tenants) <= 100
    refused = {problem.resource for problem in problems if problem.resource.kind == "TenantPolicy"}
    assert len(refused) + len(config.tenants) == len(decoded)
    assert all("k" * 24 not in str(problem) and "short" not in str(problem) for problem in problems)


@settings(max_examples=200, deadline=None)
@given(policies=st.lists(POLICIES, max_size=8), pool=POOLS)
def test_guests_have_no_more_together_than_they_are_granted(policies: list[Any], pool: Any) -> None:
    engines = decode(pool, EnginePool)
    decoded = {each.metadata.uid: each for each in (decode(item, TenantPolicy) for item in policies)}
    grant = engines.spec.grants[0] if engines.spec.grants else NO_GRANT
    config, _ = compile_policies(decoded.values(), engines, {})
    guests = [tenant for tenant in config.tenants if decoded[tenant.uid].metadata.namespace == "guest"]
    assert sum(tenant.weight for tenant in guests) <= grant.total_weight
    assert sum(tenant.kv_cache.guaranteed_percent for tenant in guests) <= grant.max_guaranteed_percent
    prefix = "guest/" if grant.tenant_prefix is None else grant.tenant_prefix
    assert all(name.startswith(prefix) for tenant in guests for name in (tenant.tenant_id, *tenant.header_values))


@settings(max_examples=200, deadline=None)
@given(garbage=JSON, resource=st.sampled_from([TenantPolicy, EnginePool, Secret]))
def test_garbage_is_refused_with_a_problem(garbage: object, resource: type[TenantPolicy]) -> None:
    try:
        decode(garbage, resource)
    except InvalidResourceError as error:
        assert error.problem.message
        str(error).encode()
    else:
        raise AssertionError("garbage passed")


@settings(max_examples=200, deadline=None)
@given(data=st.data(), policy=POLICIES, junk=JSON)
def test_a_policy_with_something_replaced_compiles_or_is_a_problem(data: st.DataObject, policy: Any, junk: Any) -> None:
    mutant = copy.deepcopy(policy)
    target = mutant
    while isinstance(target, dict | list) and target:
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
        if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.booleans()):
            target[key] = junk
            break
        target = target[key]
    try:
        decoded = decode(mutant, TenantPolicy)
    except InvalidResourceError as error:
        assert error.problem.reason == "Invalid"
        return
    compile_policies([decoded], None, {})[0].canonical_json()
