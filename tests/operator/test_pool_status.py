"""What the status of a pool says, of itself and of each pod, and where its policies say it too."""

import dataclasses

import msgspec
import pytest

from evenhand_operator.conditions import MAX_POD_ROWS, policy_programmed, policy_status, pool_status
from evenhand_operator.offer import Hold, HoldReason
from evenhand_operator.pod_report import PodReport
from evenhand_policy.errors import PolicyProblem, Reason
from evenhand_policy.status import EnginePoolStatus, PodState
from evenhand_policy.version import Version
from harness.observed import CURRENT, NOW, conditions_of, plan, policy, pool, pool_state, report

APPLIED, PENDING, REJECTED, UNREACHABLE = PodState.APPLIED, PodState.PENDING, PodState.REJECTED, PodState.UNREACHABLE


def test_pods_are_not_compared_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thousand of them that would take a tenth of a second, each time that one has answered."""
    reports = [report(f"pod-{index}", PodState.APPLIED, CURRENT) for index in range(3)]

    def compare(*_: object) -> bool:
        raise AssertionError("two pods were compared")

    monkeypatch.setattr(PodReport, "__eq__", compare)
    assert len(pool_state(reports).reports) == 3


def test_pool_status_has_a_row_for_every_pod_the_failing_first() -> None:
    reports = [
        report("a", APPLIED, (2, 5)),
        report("b", UNREACHABLE, (2, 4)),
        report("c", PENDING, None),
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


def test_pool_without_pods_is_not_ready() -> None:
    """`kubectl wait` for a pool that has just been made waits for its engines."""
    status = pool_status(pool(), (), 0, pool_state([]), NOW)
    assert conditions_of(status)["Ready"] == conditions_of(status)["Programmed"] == ("False", "NoPods")
    assert conditions_of(status)["Stalled"][0] == "False"


def test_stopped_rollout_is_seen_on_the_pool_and_on_the_policies_that_wait() -> None:
    reports = [report("p0", REJECTED, Version(2, 4)), report("p1", PENDING, Version(2, 4))]
    state = pool_state(reports, stopped="pod p0 does not take the document: no")
    old, new = (policy_programmed(policy("a"), (), Version(2, first), state) for first in (4, 5))
    assert (old.status, old.reason) == ("True", "Programmed")
    assert (new.status, new.reason) == ("False", "RolloutStopped")
    assert new.message == "EnginePool inference/default: pod p0 does not take the document: no"
    status = pool_status(pool(), (), 0, state, NOW)
    assert conditions_of(status)["Ready"] == ("False", "RolloutStopped")


@pytest.mark.parametrize("reason", HoldReason)
def test_what_is_held_back_is_seen_on_the_pool_and_on_the_policies_that_wait(reason: HoldReason) -> None:
    state = pool_state([report("p0", APPLIED, Version(2, 5))], hold=Hold(reason, "because"))
    old, new = (policy_programmed(policy("a"), (), first, state) for first in (Version(2, 5), None))
    assert old.status == "True"
    assert (new.status, new.reason, new.message) == ("False", str(reason), "EnginePool inference/default: because")
    assert conditions_of(pool_status(pool(), (), 0, state, NOW))["Ready"] == ("False", str(reason))


def test_what_some_engine_does_not_understand_is_told_to_whom_it_concerns() -> None:
    concerned = policy("a")
    left_out = {concerned.uid: ("tenants.fairness",)}
    state = pool_state([report("p0", APPLIED, Version(2, 5))], left_out=left_out)
    verdicts = [policy_programmed(each, (), Version(2, 5), state) for each in (concerned, policy("b"))]
    assert [(each.status, each.reason) for each in verdicts] == [("False", "NotUnderstood"), ("True", "Programmed")]
    assert "tenants.fairness" in verdicts[0].message
    [programmed] = [c for c in pool_status(pool(), (), 0, state, NOW).conditions if c.type == "Programmed"]
    assert programmed.message.endswith("left out, since some do not understand it: tenants.fairness")


def test_pod_that_is_not_ready_counts_for_nothing_but_is_shown_where_it_refuses() -> None:
    starting = [
        dataclasses.replace(each, pod=msgspec.structs.replace(each.pod, ready_since=None))
        for each in (report("p1", REJECTED, None), report("p2", UNREACHABLE, None))
    ]
    state = pool_state([report("p0", APPLIED, Version(2, 5)), *starting])
    assert (state.num_ready, state.num_applied) == (1, 1)
    status = pool_status(pool(), (), 0, state, NOW)
    assert [row.name for row in status.pods] == ["p1", "p0"]
    assert conditions_of(status)["Ready"] == ("True", "Ready")


def test_rows_and_messages_have_a_bound() -> None:
    """The API server would refuse the whole status."""
    reports = [report(f"p{index}", APPLIED, Version(2, 5)) for index in range(MAX_POD_ROWS + 50)]
    reports[-1] = dataclasses.replace(reports[-1], state=REJECTED, message="x" * 5000)
    status = pool_status(pool(), (), 0, pool_state(reports, stopped="y" * 40_000), NOW)
    assert len(status.pods) == MAX_POD_ROWS
    assert (status.pods[0].name, len(status.pods[0].message or "")) == (reports[-1].pod.name, 512)
    assert status.applied == f"{MAX_POD_ROWS + 50}/{MAX_POD_ROWS + 50}"
    assert max(len(condition.message) for condition in status.conditions) <= 4096
    msgspec.convert(msgspec.to_builtins(status), EnginePoolStatus)
    stopped = pool_status(pool(), (), 0, pool_state([report("p", PENDING, None)], stopped="y" * 40_000), NOW)
    assert {len(each.message) for each in stopped.conditions if each.reason == "RolloutStopped"} == {4096}
    problems = tuple(
        PolicyProblem(resource=pool().reference, path="p", reason=Reason.INVALID, message="z" * 900) for _ in range(9)
    )
    told = policy_status(policy("a"), problems, None, policy_programmed(policy("a"), problems, None, None), NOW)
    assert max(len(condition.message) for condition in told.conditions) == 4096
