"""From objects to documents and statuses: pure, so held by properties and by tables."""

import dataclasses
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_operator.conditions import MAX_POD_ROWS, PoolState, policy_programmed, policy_status, pool_status
from evenhand_operator.events import transitions
from evenhand_operator.observed import ObservedPolicy, ObservedPool, read_policy, read_pool
from evenhand_operator.offer import Hold, HoldReason
from evenhand_operator.pod_report import PodReport
from evenhand_operator.reconcile import Plan, World, close_pool, make_plan
from evenhand_operator.rollout import Rollout, Stored
from evenhand_operator.secret_references import referenced_secrets
from evenhand_policy.config import SchedulerConfig, ServiceAccountIssuer, TenantConfig
from evenhand_policy.decode import decode
from evenhand_policy.errors import PolicyProblem, Reason
from evenhand_policy.push_document import encode_document
from evenhand_policy.secret import API_KEYS_TYPE, Secret
from evenhand_policy.status import Condition, ConditionStatus, EnginePoolStatus, PodState, TenantPolicyStatus
from evenhand_policy.version import Version
from harness.builders import make_policy, make_pool, make_secret

Json = dict[str, Any]
CURRENT = Version(2, 5)
NOW = 1_800_000_000.0
ISSUER = ServiceAccountIssuer(issuer="https://issuer", audience="evenhand", jwks={"keys": []})


def _meta(name: str, namespace: str = "inference", generation: int = 1, age: int = 0) -> Json:
    """Arguments of `make_meta`."""
    uid, created = f"uid-{namespace}-{name}", f"2026-01-01T00:00:{age:02d}Z"
    return {"namespace": namespace, "generation": generation, "creationTimestamp": created, "uid": uid}


def policy_object(name: str, *, status: Json | None = None, spec: Json | None = None, **meta: Any) -> Json:
    return make_policy(name, meta=_meta(name, **meta), status=status or {}, **spec or {})


def pool_object(name: str = "default", *, status: Json | None = None, spec: Json | None = None, **meta: Any) -> Json:
    return make_pool(name, meta=_meta(name, **meta), status=status or {}, **spec or {})


def policy(name: str, **changes: Any) -> ObservedPolicy:
    observed = read_policy(policy_object(name, **changes))
    assert observed is not None
    return observed


def pool(name: str = "default", **changes: Any) -> ObservedPool:
    observed = read_pool(pool_object(name, **changes))
    assert observed is not None
    return observed


def secret(name: str, *values: str, namespace: str = "inference") -> Secret:
    obj = make_secret(name, *values, namespace=namespace)
    del obj["type"]
    return decode({"apiVersion": "v1", "kind": "Secret"} | obj, Secret)


def plan(policies: list[ObservedPolicy], pools: list[ObservedPool] | None = None, *secrets: Secret) -> Plan:
    found = {(each.metadata.namespace, each.metadata.name): each for each in secrets}
    world = World("c1", ISSUER, tuple(policies), tuple([pool()] if pools is None else pools), found, {})
    return make_plan(world)


def reasons(made: Plan, observed: ObservedPolicy | ObservedPool) -> list[Reason]:
    return [problem.reason for problem in made.problems.get(observed.reference, ())]


# ---- documents


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


# ---- versions


def config(*tenants: tuple[str, int]) -> SchedulerConfig:
    return SchedulerConfig(
        tenants=tuple(TenantConfig(tenant_id=name, uid=f"uid-inference-{name}", generation=g) for name, g in tenants)
    )


def advance(
    rollout: Rollout, config: SchedulerConfig, policies: dict[str, ObservedPolicy] | None = None, num_replicas: int = 1
) -> bool:
    return rollout.advance(config, encode_document(config), num_replicas, policies or {})


def test_revision_grows_with_the_content_and_the_number_of_replicas_and_only_with_them() -> None:
    rollout = Rollout(3, Stored(41))
    assert advance(rollout, config(("a", 1)))
    assert rollout.version == (3, 42)
    assert not advance(rollout, config(("a", 1)))
    assert advance(rollout, config(("a", 2)))
    assert rollout.version == (3, 43)
    assert advance(rollout, config(("a", 2)), num_replicas=2)
    assert rollout.version == (3, 44)


def test_new_leader_goes_on_where_the_last_one_was() -> None:
    content = config(("a", 1))
    stored = Stored(41, 2, content, encode_document(content))
    same, other, more = (Rollout(4, stored) for _ in range(3))
    assert advance(same, config(("a", 1)), num_replicas=2)
    assert same.version == (4, 41)
    advance(other, config(("a", 2)), num_replicas=2)
    assert other.version == (4, 42)
    advance(more, config(("a", 1)), num_replicas=3)
    assert more.version == (4, 42)


def test_first_version_of_a_policy_outlives_changes_of_others() -> None:
    rollout = Rollout(1, Stored(0))
    advance(rollout, config(("a", 1)))
    advance(rollout, config(("a", 1), ("b", 1)))
    assert (rollout.first_version(policy("a")), rollout.first_version(policy("b"))) == ((1, 1), (1, 2))
    assert rollout.first_version(policy("a", generation=2)) is None
    advance(rollout, config(("a", 2), ("b", 1)))
    assert rollout.first_version(policy("a", generation=2)) == (1, 3)
    advance(rollout, config(("b", 1)))
    assert rollout.first_version(policy("a", generation=2)) is None


def test_what_an_earlier_leader_reported_holds_but_only_at_first() -> None:
    programmed = policy("a", status=status_of("True", "True"))
    rollout = Rollout(4, Stored(41))
    advance(rollout, config(("a", 1), ("b", 1)), {programmed.uid: programmed})
    assert (rollout.first_version(programmed), rollout.first_version(policy("b"))) == ((0, 0), (4, 42))
    advance(rollout, config(("b", 1)), {programmed.uid: programmed})
    advance(rollout, config(("a", 1), ("b", 1)), {programmed.uid: programmed})
    assert rollout.first_version(programmed) == (4, 44)


def test_nothing_is_known_of_a_document_that_another_leader_made() -> None:
    rollout = Rollout(4, Stored(7))
    advance(rollout, config(("a", 1)))
    rollout.raise_above(10, Version(9, 30))
    assert rollout.version == rollout.first_version(policy("a")) == (10, 31)
    rollout.raise_above(11, Version(10, 2**63 - 1))
    assert rollout.version.revision < 2**21, "a pod cannot use the numbers up"


# ---- conditions


def status_of(accepted: str, programmed: str, *, generation: int = 1, reason: str = "X", **more: Any) -> Json:
    rows = {"Accepted": accepted, "Programmed": programmed, "Ready": programmed, "Stalled": "False"}
    return {
        "observedGeneration": generation,
        "conditions": [
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": "",
                "observedGeneration": generation,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
            for kind, status in rows.items()
        ],
        **more,
    }


def report(
    make: Any, name: str, state: PodState, enforced: Version | None, *, ready_for: float = 100.0, reason: str = ""
) -> PodReport:
    pod = msgspec.structs.replace(make.pod(name), ready_since=NOW - ready_for)
    return PodReport(pod=pod, state=state, since=NOW, message="why", reason=reason, boot_id="b", enforced=enforced)


def pool_state(reports: list[PodReport], current: Version = CURRENT, **more: Any) -> PoolState:
    return PoolState([each.pod for each in reports], reports, current, NOW, grace=10.0, **more)


def test_pods_are_not_compared_with_each_other(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thousand of them that would take a tenth of a second, each time that one has answered."""
    reports = [report(make, f"pod-{index}", PodState.APPLIED, CURRENT) for index in range(3)]

    def compare(*_: object) -> bool:
        raise AssertionError("two pods were compared")

    monkeypatch.setattr(PodReport, "__eq__", compare)
    assert len(pool_state(reports).reports) == 3


APPLIED, PENDING, REJECTED, UNREACHABLE = PodState.APPLIED, PodState.PENDING, PodState.REJECTED, PodState.UNREACHABLE

PODS: dict[str, tuple[list[tuple[PodState, Version | None, float]], str, str]] = {
    "no pods": ([], "True", "NoPods"),
    "all have it": ([(APPLIED, Version(2, 5), 99), (APPLIED, Version(2, 5), 99)], "True", "Programmed"),
    "later ones hold it too": ([(APPLIED, Version(2, 4), 99), (UNREACHABLE, Version(2, 4), 99)], "True", "Programmed"),
    "one has an older one": (
        [(APPLIED, Version(2, 5), 99), (UNREACHABLE, Version(2, 3), 99)],
        "False",
        "PartiallyProgrammed",
    ),
    "the same revision of another epoch": ([(UNREACHABLE, Version(1, 4), 99)], "False", "PartiallyProgrammed"),
    "a newer one of another leader": ([(REJECTED, Version(9, 9), 99)], "False", "PartiallyProgrammed"),
    "one rejects": ([(APPLIED, Version(2, 5), 99), (REJECTED, Version(2, 3), 99)], "False", "PartiallyProgrammed"),
    "one never answered": ([(APPLIED, Version(2, 5), 99), (UNREACHABLE, None, 99)], "False", "PartiallyProgrammed"),
    "one is being told": ([(APPLIED, Version(2, 5), 99), (PENDING, Version(2, 3), 99)], "False", "Pending"),
    "a new one is not counted yet": ([(APPLIED, Version(2, 5), 99), (UNREACHABLE, None, 9)], "True", "Programmed"),
    "a new one that rejects is": ([(APPLIED, Version(2, 5), 99), (REJECTED, None, 1)], "False", "PartiallyProgrammed"),
    "only new ones": ([(PENDING, None, 1)], "False", "Pending"),
}


@pytest.mark.parametrize("case", PODS)
def test_policy_is_programmed_when_every_ready_pod_enforces_its_generation(case: str, make: Any) -> None:
    """Its generation came with (2, 4); the current document is (2, 5)."""
    rows, status, reason = PODS[case]
    reports = [report(make, f"p{i}", state, v, ready_for=age) for i, (state, v, age) in enumerate(rows)]
    verdict = policy_programmed(policy("a"), (), Version(2, 4), pool_state(reports))
    assert (verdict.status, verdict.reason) == (status, reason)


def test_programmed_policy_does_not_flap_when_the_first_pods_come(make: Any) -> None:
    programmed = policy("a", status=status_of("True", "True"))
    verdict = policy_programmed(
        programmed, (), Version(2, 4), pool_state([report(make, "p", PENDING, None, ready_for=1)])
    )
    assert (verdict.status, verdict.reason) == ("True", "NoPods")


def conditions_of(status: TenantPolicyStatus | EnginePoolStatus) -> dict[str, tuple[str, str]]:
    return {condition.type: (str(condition.status), condition.reason) for condition in status.conditions}


def judge(observed: ObservedPolicy, made: Plan, state: PoolState | None, first: Version | None) -> TenantPolicyStatus:
    problems = made.problems.get(observed.reference, ())
    return policy_status(observed, problems, first, policy_programmed(observed, problems, first, state), NOW)


def test_status_of_an_enforced_policy(make: Any) -> None:
    observed = policy("a", generation=3)
    status = judge(observed, plan([observed]), pool_state([report(make, "p", APPLIED, (2, 5))]), (2, 4))
    assert conditions_of(status) == {
        "Accepted": ("True", "Accepted"),
        "Programmed": ("True", "Programmed"),
        "Ready": ("True", "Ready"),
        "Stalled": ("False", "NotStalled"),
    }
    assert (status.observed_generation, status.programmed_revision) == (3, 4)
    assert {condition.observed_generation for condition in status.conditions} == {3}


@pytest.mark.parametrize(
    ("spec", "reason", "stalled"),
    [
        ({"weight": 1.5}, "Invalid", "True"),
        ({"tenant": "taken"}, "Conflicted", "True"),
        ({"poolRef": {"name": "missing"}}, "PoolNotFound", "False"),
        (
            {"identities": [{"name": "k", "type": "APIKey", "apiKey": {"secretRef": {"name": "gone"}}}]},
            "SecretNotFound",
            "False",
        ),
    ],
)
def test_refused_policy_is_stalled_unless_waiting_may_help(spec: Json, reason: str, stalled: str) -> None:
    observed = policy("late", spec=spec, age=9)
    status = judge(observed, plan([observed, policy("taken")]), None, None)
    found = conditions_of(status)
    assert found["Accepted"] == found["Ready"] == ("False", reason)
    assert found["Programmed"] == ("False", "NotAccepted")
    assert found["Stalled"][0] == stalled
    assert status.programmed_revision is None
    [accepted] = [condition for condition in status.conditions if condition.type == "Accepted"]
    assert "spec" in accepted.message or "taken" in accepted.message


def test_time_of_a_transition_stays_while_the_status_does(make: Any) -> None:
    before = policy("a", status=status_of("True", "False"))
    status = judge(before, plan([before]), pool_state([report(make, "p", APPLIED, (2, 5))]), (2, 4))
    times = {condition.type: condition.last_transition_time for condition in status.conditions}
    old, new = "2026-01-01T00:00:00Z", "2027-01-15T08:00:00Z"
    assert times == {"Accepted": old, "Programmed": new, "Ready": new, "Stalled": old}


def test_status_that_is_right_is_recognised(make: Any) -> None:
    observed = policy("a")
    state = pool_state([report(make, "p", APPLIED, (2, 5))])
    status = judge(observed, plan([observed]), state, (2, 4))
    written = {key: value for key, value in msgspec.to_builtins(status).items() if value is not None}
    again = policy("a", status=written | {"futureMember": {"of": "another version"}})
    assert judge(again, plan([again]), state, (2, 4)) == again.status == status


@pytest.mark.parametrize("status", [{"conditions": "nonsense"}, {"conditions": [{"type": 7}]}, {"conditions": [3]}])
def test_malformed_status_says_nothing(status: Json) -> None:
    read = policy("a", status=status | {"observedGeneration": 1})
    assert not read.is_programmed
    assert ConditionStatus.TRUE not in [condition.status for condition in read.status.conditions]


def test_pool_status_has_a_row_for_every_pod_the_failing_first(make: Any) -> None:
    reports = [
        report(make, "a", APPLIED, (2, 5)),
        report(make, "b", UNREACHABLE, (2, 4)),
        report(make, "c", PENDING, None),
    ]
    reports[0] = dataclasses.replace(reports[0], backend="vllm")
    observed = pool(generation=2)
    status = pool_status(observed, (), 17, pool_state(reports), NOW)
    assert [(row.name, row.state, row.epoch, row.revision) for row in status.pods] == [
        ("b", UNREACHABLE, 2, 4),
        ("a", APPLIED, 2, 5),
        ("c", PENDING, None, None),
    ]
    assert [row.backend for row in status.pods] == [None, "vllm", None]
    assert (status.epoch, status.revision, status.tenants) == (2, 5, 17)
    assert (status.desired_pods, status.applied_pods, status.applied) == (3, 1, "1/3")
    assert conditions_of(status)["Programmed"] == ("False", "PartiallyProgrammed")
    assert conditions_of(status)["Ready"] == ("False", "PartiallyProgrammed")


def test_pool_that_cannot_be_read_says_so_and_nothing_of_pods() -> None:
    bad = pool(spec={"selector": {}}, generation=4)
    made = plan([], [bad])
    status = pool_status(bad, made.problems[bad.reference], 0, None, NOW)
    assert conditions_of(status)["Accepted"] == ("False", "Invalid")
    assert conditions_of(status)["Programmed"] == ("False", "NotAccepted")
    assert (status.observed_generation, status.revision, status.pods) == (4, None, ())


def test_object_without_a_status_is_read() -> None:
    obj = policy_object("a")
    del obj["status"]
    read = read_policy(obj)
    assert read is not None
    assert read.status == TenantPolicyStatus()


def test_pool_without_pods_is_not_ready() -> None:
    """`kubectl wait` for a pool that has just been made waits for its engines."""
    status = pool_status(pool(), (), 0, pool_state([]), NOW)
    assert conditions_of(status)["Ready"] == conditions_of(status)["Programmed"] == ("False", "NoPods")
    assert conditions_of(status)["Stalled"][0] == "False"


def test_stopped_rollout_is_seen_on_the_pool_and_on_the_policies_that_wait(make: Any) -> None:
    reports = [report(make, "p0", REJECTED, Version(2, 4)), report(make, "p1", PENDING, Version(2, 4))]
    state = pool_state(reports, stopped="pod p0 does not take the document: no")
    old, new = (policy_programmed(policy("a"), (), Version(2, first), state) for first in (4, 5))
    assert (old.status, old.reason) == ("True", "Programmed")
    assert (new.status, new.reason) == ("False", "RolloutStopped")
    assert new.message == "EnginePool inference/default: pod p0 does not take the document: no"
    status = pool_status(pool(), (), 0, state, NOW)
    assert conditions_of(status)["Ready"] == ("False", "RolloutStopped")


@pytest.mark.parametrize("reason", HoldReason)
def test_what_is_held_back_is_seen_on_the_pool_and_on_the_policies_that_wait(make: Any, reason: HoldReason) -> None:
    state = pool_state([report(make, "p0", APPLIED, Version(2, 5))], hold=Hold(reason, "because"))
    old, new = (policy_programmed(policy("a"), (), first, state) for first in (Version(2, 5), None))
    assert old.status == "True"
    assert (new.status, new.reason, new.message) == ("False", str(reason), "EnginePool inference/default: because")
    assert conditions_of(pool_status(pool(), (), 0, state, NOW))["Ready"] == ("False", str(reason))


def test_what_some_engine_does_not_understand_is_told_to_whom_it_concerns(make: Any) -> None:
    concerned = policy("a")
    left_out = {concerned.uid: ("tenants.fairness",)}
    state = pool_state([report(make, "p0", APPLIED, Version(2, 5))], left_out=left_out)
    verdicts = [policy_programmed(each, (), Version(2, 5), state) for each in (concerned, policy("b"))]
    assert [(each.status, each.reason) for each in verdicts] == [("False", "NotUnderstood"), ("True", "Programmed")]
    assert "tenants.fairness" in verdicts[0].message
    [programmed] = [c for c in pool_status(pool(), (), 0, state, NOW).conditions if c.type == "Programmed"]
    assert programmed.message.endswith("left out, since some do not understand it: tenants.fairness")


def test_pod_that_is_not_ready_counts_for_nothing_but_is_shown_where_it_refuses(make: Any) -> None:
    starting = [
        dataclasses.replace(each, pod=msgspec.structs.replace(each.pod, ready_since=None))
        for each in (report(make, "p1", REJECTED, None), report(make, "p2", UNREACHABLE, None))
    ]
    state = pool_state([report(make, "p0", APPLIED, Version(2, 5)), *starting])
    assert (state.num_ready, state.num_applied) == (1, 1)
    status = pool_status(pool(), (), 0, state, NOW)
    assert [row.name for row in status.pods] == ["p1", "p0"]
    assert conditions_of(status)["Ready"] == ("True", "Ready")


def test_rows_and_messages_have_a_bound(make: Any) -> None:
    """The API server would refuse the whole status."""
    reports = [report(make, f"p{index}", APPLIED, Version(2, 5)) for index in range(MAX_POD_ROWS + 50)]
    reports[-1] = dataclasses.replace(reports[-1], state=REJECTED, message="x" * 5000)
    status = pool_status(pool(), (), 0, pool_state(reports, stopped="y" * 40_000), NOW)
    assert len(status.pods) == MAX_POD_ROWS
    assert (status.pods[0].name, len(status.pods[0].message or "")) == (reports[-1].pod.name, 512)
    assert status.applied == f"{MAX_POD_ROWS + 50}/{MAX_POD_ROWS + 50}"
    assert max(len(condition.message) for condition in status.conditions) <= 4096
    msgspec.convert(msgspec.to_builtins(status), EnginePoolStatus)
    problems = tuple(
        PolicyProblem(resource=pool().reference, path="p", reason=Reason.INVALID, message="z" * 900) for _ in range(9)
    )
    told = policy_status(policy("a"), problems, None, policy_programmed(policy("a"), problems, None, None), NOW)
    assert max(len(condition.message) for condition in told.conditions) == 4096


# ---- events


def condition(kind: str, status: str, reason: str) -> Condition:
    return Condition(
        type=kind,
        status=ConditionStatus(status),
        observed_generation=1,
        last_transition_time="2026-01-01T00:00:00Z",
        reason=reason,
        message=f"{kind} is {status}",
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("Unknown", "Pending"), ("True", "Accepted"), None),
        (("Unknown", "Pending"), ("False", "Invalid"), (True, "Invalid")),
        (("True", "Accepted"), ("True", "Accepted"), None),
        (("True", "Accepted"), ("False", "Conflicted"), (True, "Conflicted")),
        (("False", "Conflicted"), ("False", "Conflicted"), None),
        (("False", "Conflicted"), ("False", "Invalid"), (True, "Invalid")),
        (("False", "Conflicted"), ("True", "Accepted"), (False, "Accepted")),
        (("True", "Programmed"), ("False", "Pending"), None),
        (("False", "Pending"), ("True", "Programmed"), None),
    ],
)
def test_events_tell_transitions_only(
    before: tuple[str, str], after: tuple[str, str], expected: tuple[bool, str] | None
) -> None:
    found = transitions([condition("Accepted", *before)], [condition("Accepted", *after)])
    assert [(each.is_warning, each.reason) for each in found] == ([] if expected is None else [expected])
