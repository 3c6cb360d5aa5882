"""From objects to documents: pure, so held by properties and by tables."""

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from evenhand_operator.conditions import PoolState, policy_programmed, policy_status, pool_status
from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.reconcile import close_pool
from evenhand_operator.secret_references import referenced_secrets
from evenhand_policy.errors import Reason
from evenhand_policy.secret import API_KEYS_TYPE
from evenhand_policy.status import ConditionStatus
from evenhand_policy.version import Version
from harness.observed import ISSUER, NOW, plan, policy, pool, reasons, secret


def test_field_that_only_a_newer_operator_knows_is_ignored_and_named() -> None:
    newer = policy("chat", spec={"weight": 4, "limits": {"requestsPerDay": 9}, "colour": "red"})
    made = plan([newer], [pool(spec={"region": "eu"})])
    [tenant] = made.pools["inference", "default"].config.tenants
    assert tenant.weight == 4
    accepted = policy_status(newer, (), None, policy_programmed(newer, (), None, None), NOW).conditions[0]
    assert accepted.status is ConditionStatus.TRUE
    assert accepted.message.endswith(
        "ignored, since only a newer operator knows it: spec.limits.requestsPerDay, spec.colour"
    )
    [observed] = [each.observed for each in made.pools.values()]
    assert observed.ignored == ("spec.region",)


def test_document_holds_every_accepted_policy_and_what_surrounds_them() -> None:
    made = plan([policy("b"), policy("a", spec={"weight": 4})])
    config = made.pools["inference", "default"].config
    assert [(tenant.tenant_id, tenant.weight) for tenant in config.tenants] == [("a", 4), ("b", 1)]
    issuer = msgspec.structs.replace(ISSUER, audience="evenhand/inference/default", max_age_seconds=86400)
    assert (config.cluster, config.service_accounts) == ("c1", issuer)
    assert made.problems == {}


def test_pool_says_which_tokens_its_engines_take() -> None:
    own = pool(spec={"serviceAccountTokens": {"audience": "gpu", "maxAge": "10m"}})
    issuer = plan([], [own]).pools["inference", "default"].config.service_accounts
    assert issuer is not None
    assert (issuer.audience, issuer.max_age_seconds) == ("gpu", 600)


def test_pool_that_closes_admits_nobody() -> None:
    closed = close_pool(plan([policy("a")]).pools["inference", "default"])
    assert closed.is_closed
    assert (closed.config.tenants, closed.config.unknown_tenants.action) == ((), "Reject")
    assert (closed.config.cluster, closed.config.pool.name if closed.config.pool else "") == ("c1", "default")
    assert (closed.config.service_accounts, closed.config.gateway.key_hashes) == (None, ())


def test_policy_without_its_pool_waits_for_it() -> None:
    lonely = policy("lonely", spec={"poolRef": {"name": "elsewhere"}})
    made = plan([lonely, policy("fine")])
    assert reasons(made, lonely) == [Reason.POOL_NOT_FOUND]
    assert [tenant.tenant_id for tenant in made.pools["inference", "default"].config.tenants] == ["fine"]


def test_object_that_cannot_be_read_is_told_so_and_the_others_go_on() -> None:
    bad = policy("bad", spec={"weight": 3.5})
    made = plan([bad, policy("fine")])
    [problem] = made.problems[bad.reference]
    assert (problem.reason, problem.path) == (Reason.INVALID, "spec.weight")
    assert [tenant.tenant_id for tenant in made.pools["inference", "default"].config.tenants] == ["fine"]


def test_pool_that_cannot_be_read_has_no_plan() -> None:
    bad, waiting = pool(spec={"selector": {}}), policy("waiting")
    made = plan([waiting], [bad])
    assert made.pools == {}
    assert (reasons(made, bad), reasons(made, waiting)) == ([Reason.INVALID], [Reason.POOL_NOT_FOUND])


def test_most_important_problem_comes_first() -> None:
    spec = {
        "tenant": "a",
        "identities": [{"name": "k", "type": "APIKey", "apiKey": {"secretRef": {"name": "gone"}}}],
        "poolRef": {"namespace": "other", "name": "default"},
    }
    guest = policy("guest", spec=spec)
    made = plan([guest], [pool(namespace="other")])
    assert reasons(made, guest) == [Reason.NOT_ALLOWED, Reason.SECRET_NOT_FOUND]


names = st.sampled_from(["a", "b", "c", "d"])
policies = st.lists(
    st.builds(
        lambda name, tenant, age, weight, pool_name: policy(
            name, age=age, spec={"tenant": tenant, "weight": weight, "poolRef": {"name": pool_name}}
        ),
        names,
        names,
        st.integers(0, 3),
        st.integers(1, 9),
        st.sampled_from(["default", "second", "missing"]),
    ),
    max_size=8,
    unique_by=lambda observed: observed.key,
)


@given(policies, st.randoms(use_true_random=False))
def test_order_of_arrival_decides_nothing(observed: list[ObservedPolicy], shuffler: random.Random) -> None:
    pools = [pool("default"), pool("second")]
    shuffled = shuffler.sample(observed, len(observed))
    assert plan(observed, pools) == plan(shuffled, pools[::-1])


@given(policies)
def test_every_policy_is_in_one_document_or_has_a_problem(observed: list[ObservedPolicy]) -> None:
    made = plan(observed, [pool("default"), pool("second")])
    included = [tenant.uid for each in made.pools.values() for tenant in each.config.tenants]
    refused = [each.uid for each in observed if each.reference in made.problems]
    assert sorted(included + refused) == sorted(each.uid for each in observed)


def test_secret_of_another_type_works_and_is_warned_about() -> None:
    def keyed(name: str) -> ObservedPolicy:
        identity = {"name": "k", "type": "APIKey", "apiKey": {"secretRef": {"name": name}}}
        return policy(name, spec={"identities": [identity]})

    ours = msgspec.structs.replace(secret("ours", "a-key-that-nobody-can-guess-0001"), type=API_KEYS_TYPE)
    old = secret("old", "a-key-that-nobody-can-guess-0002")
    gateway = pool(spec={"gateway": {"apiKeys": {"secretRef": {"name": "old-gateway"}}}})
    key = secret("old-gateway", "a-key-that-nobody-can-guess-0003")
    made = plan([keyed("ours"), keyed("old"), keyed("missing")], [gateway], ours, old, key)
    advice = "{} should be of type evenhand.dev/api-keys, by which the operator selects Secrets".format
    assert made.warnings == {keyed("old").reference: advice("old"), gateway.reference: advice("old-gateway")}
    verdict = policy_programmed(keyed("old"), (), None, None)
    accepted = policy_status(keyed("old"), (), None, verdict, NOW, made.warnings[keyed("old").reference]).conditions[0]
    assert (accepted.status, accepted.reason) == (ConditionStatus.TRUE, "Accepted")
    assert accepted.message == f"The object is valid and has what it claims; {advice('old')}"
    told = pool_status(gateway, (), 0, PoolState([], [], Version(1, 1), NOW, 0), NOW, made.warnings[gateway.reference])
    assert told.conditions[0].message.endswith(advice("old-gateway"))


def test_named_secrets_and_no_others_are_wanted() -> None:
    keys = {"apiKeys": {"secretRef": {"name": "gateway"}}}
    identity = {"name": "k", "type": "APIKey", "apiKey": {"secretRef": {"name": "chat"}}}
    found = referenced_secrets(
        [policy("a", spec={"identities": [identity]}, namespace="x")], [pool(spec={"gateway": keys})]
    )
    assert found == {("x", "chat"), ("inference", "gateway")}
