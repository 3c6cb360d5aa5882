"""What the status of a policy says."""

import msgspec
import pytest

from evenhand_operator.conditions import PoolState, policy_programmed, policy_status
from evenhand_operator.observed import ObservedPolicy, read_policy
from evenhand_operator.reconcile import Plan
from evenhand_policy.status import ConditionStatus, PodState, TenantPolicyStatus
from evenhand_policy.version import Version
from harness.observed import NOW, Json, conditions_of, plan, policy, policy_object, pool_state, report, status_of

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
def test_policy_is_programmed_when_every_ready_pod_enforces_its_generation(case: str) -> None:
    """Its generation came with (2, 4); the current document is (2, 5)."""
    rows, status, reason = PODS[case]
    reports = [report(f"p{i}", state, v, ready_for=age) for i, (state, v, age) in enumerate(rows)]
    verdict = policy_programmed(policy("a"), (), Version(2, 4), pool_state(reports))
    assert (verdict.status, verdict.reason) == (status, reason)


def test_programmed_policy_does_not_flap_when_the_first_pods_come() -> None:
    programmed = policy("a", status=status_of("True", "True"))
    verdict = policy_programmed(programmed, (), Version(2, 4), pool_state([report("p", PENDING, None, ready_for=1)]))
    assert (verdict.status, verdict.reason) == ("True", "NoPods")
    assert "have just started" in verdict.message, "that there is none would be untrue"
    assert "no ready pod" in policy_programmed(programmed, (), Version(2, 4), pool_state([])).message


def judge(observed: ObservedPolicy, made: Plan, state: PoolState | None, first: Version | None) -> TenantPolicyStatus:
    problems = made.problems.get(observed.reference, ())
    return policy_status(observed, problems, first, policy_programmed(observed, problems, first, state), NOW)


def test_status_of_an_enforced_policy() -> None:
    observed = policy("a", generation=3)
    status = judge(observed, plan([observed]), pool_state([report("p", APPLIED, (2, 5))]), (2, 4))
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


def test_time_of_a_transition_stays_while_the_status_does() -> None:
    before = policy("a", status=status_of("True", "False"))
    status = judge(before, plan([before]), pool_state([report("p", APPLIED, (2, 5))]), (2, 4))
    times = {condition.type: condition.last_transition_time for condition in status.conditions}
    old, new = "2026-01-01T00:00:00Z", "2027-01-15T08:00:00Z"
    assert times == {"Accepted": old, "Programmed": new, "Ready": new, "Stalled": old}


def test_status_that_is_right_is_recognised() -> None:
    observed = policy("a")
    state = pool_state([report("p", APPLIED, (2, 5))])
    status = judge(observed, plan([observed]), state, (2, 4))
    written = {key: value for key, value in msgspec.to_builtins(status).items() if value is not None}
    again = policy("a", status=written | {"futureMember": {"of": "another version"}})
    assert judge(again, plan([again]), state, (2, 4)) == again.status == status


@pytest.mark.parametrize("status", [{"conditions": "nonsense"}, {"conditions": [{"type": 7}]}, {"conditions": [3]}])
def test_malformed_status_says_nothing(status: Json) -> None:
    read = policy("a", status=status | {"observedGeneration": 1})
    assert not read.is_programmed
    assert ConditionStatus.TRUE not in [condition.status for condition in read.status.conditions]


def test_object_without_a_status_is_read() -> None:
    obj = policy_object("a")
    del obj["status"]
    read = read_policy(obj)
    assert read is not None
    assert read.status == TenantPolicyStatus()


def test_messages_have_a_bound() -> None:
    """The API server would refuse the whole status."""
    state = pool_state([report("p", PENDING, Version(2, 3))], stopped="y" * 40_000)
    assert len(policy_programmed(policy("a"), (), Version(2, 5), state).message) == 4096
    newer = policy("a", spec={f"field{index}": index for index in range(1000)})
    accepted = policy_status(newer, (), None, policy_programmed(newer, (), None, None), NOW).conditions[0]
    assert (accepted.status, len(accepted.message)) == (ConditionStatus.TRUE, 4096)
