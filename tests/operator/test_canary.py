"""Which pod is given a document that none has yet, and what stops it from going to the others."""

from dataclasses import replace
from typing import Any

import pytest

from evenhand_operator.canary import PATIENCE_SECONDS, Canary
from evenhand_operator.pod_report import PodReport
from evenhand_policy.status import PodState
from evenhand_policy.version import Version

OLD, NEW, NEWER = "sha256:old", "sha256:new", "sha256:newer"
VERSION = Version(1, 2)
ANSWERED = {"boot_id": "b", "digest": OLD, "is_well": True}


class Pool:
    """Pods that enforce the old document, and the canary of the new one at the time `now`."""

    def __init__(self, make: Any, count: int = 4) -> None:
        self.now = 0.0
        self.ended: set[str] = set()
        self.canary = Canary(lambda: self.now, lambda uid: uid in self.ended | self._running())
        self.reports = {
            f"pod-{index}": PodReport(pod=make.pod(f"pod-{index}"), state=PodState.APPLIED, since=0.0, **ANSWERED)
            for index in range(count)
        }
        self._make = make
        self.look()

    def _running(self) -> set[str]:
        return {report.pod.uid for report in self.reports.values()}

    def look(self, digest: str = NEW, version: Version = VERSION) -> None:
        self.canary.look(digest, version, self.reports.values())

    def admitted(self, digest: str = NEW) -> list[str]:
        return [name for name, report in self.reports.items() if self.canary.admits(report.pod.instance, digest)]

    def become(self, name: str, **changes: Any) -> None:
        """What is known of a pod is another."""
        self.reports[name] = replace(self.reports[name], **changes)
        assert self.canary.concerns(self.reports[name]) or not self.admitted() or self.canary.stopped
        self.look()

    def send(self, name: str) -> None:
        assert name in self.admitted()
        self.become(name, sent=NEW)

    def end(self, name: str) -> None:
        """The container has ended, and is not started again yet."""
        self.ended.add(self.reports.pop(name).pod.uid)
        self.look()

    def restart(self, name: str) -> None:
        pod = self._make.pod(name, restarts=1)
        self.reports[name] = PodReport(pod=pod, state=PodState.PENDING, since=0.0)
        self.look()


@pytest.fixture
def pool(make: Any) -> Pool:
    return Pool(make)


def test_one_pod_is_admitted_and_the_others_when_it_is_well(pool: Pool) -> None:
    assert pool.admitted() == ["pod-0"]
    pool.send("pod-0")
    assert pool.admitted() == ["pod-0"]
    pool.become("pod-0", digest=NEW, is_well=False)
    assert pool.admitted() == ["pod-0"], "it enforces the document, but is it well?"
    pool.become("pod-0", is_well=True)
    assert pool.admitted() == ["pod-0", "pod-1", "pod-2", "pod-3"]
    assert pool.canary.is_proven(NEW)


def test_next_document_begins_with_one_pod_again(pool: Pool) -> None:
    pool.become("pod-0", digest=NEW, sent=NEW)
    pool.look(NEWER, Version(1, 3))
    assert len(pool.admitted(NEWER)) == 1
    assert pool.admitted(NEW) == list(pool.reports), "what is proven may still be sent"


@pytest.mark.parametrize("following", ["sha256:aaa", "sha256:zzz"])
def test_whatever_follows_a_proven_document_is_tried_anew(pool: Pool, following: str) -> None:
    pool.become("pod-0", digest=NEW, sent=NEW)
    pool.look(following, Version(1, 3))
    [name] = pool.admitted(following)
    assert pool.canary.concerns(replace(pool.reports[name], digest=following, is_well=True))
    assert not pool.canary.is_proven(following)


def test_document_that_some_pod_enforces_already_needs_no_trial(make: Any) -> None:
    """A new leader, and one old pod that a new one joins."""
    pool = Pool(make)
    pool.look(OLD)
    assert pool.admitted(OLD) == list(pool.reports)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({}, {"state": PodState.PENDING}),
        ({}, {"state": PodState.UNREACHABLE}),
        ({}, {"state": PodState.REJECTED}),
    ],
)
def test_pod_that_did_well_is_preferred(make: Any, better: Any, worse: Any) -> None:
    pool = Pool(make, 2)
    pool.reports["pod-0"] = replace(pool.reports["pod-0"], **worse)
    pool.reports["pod-1"] = replace(pool.reports["pod-1"], **better)
    pool.look(NEWER, Version(1, 3))
    assert pool.admitted(NEWER) == ["pod-1"]


def test_nobody_is_admitted_where_nobody_can_be_reached_until_one_can(pool: Pool) -> None:
    for name in pool.reports:
        pool.reports[name] = replace(pool.reports[name], state=PodState.UNREACHABLE)
    pool.look()
    assert (pool.admitted(), pool.canary.stopped) == ([], "")
    pool.become("pod-2", state=PodState.PENDING)
    assert pool.admitted() == ["pod-2"]


def test_pod_that_is_restarted_after_it_was_sent_the_document_stops_the_rollout(pool: Pool) -> None:
    pool.send("pod-0")
    pool.restart("pod-0")
    assert pool.canary.stopped == "pod pod-0 ended when it was sent the document"
    assert pool.admitted() == []


def test_pod_whose_container_has_ended_is_not_deleted(pool: Pool) -> None:
    """It is no pod that can be pushed to before it is started again, and the next one would die too."""
    pool.send("pod-0")
    pool.end("pod-0")
    assert (pool.canary.stopped, pool.admitted()) == ("pod pod-0 ended when it was sent the document", [])
    pool.look()
    assert pool.admitted() == []


def test_rollout_stays_stopped_while_the_pod_that_stopped_it_is_started_again(pool: Pool) -> None:
    pool.send("pod-0")
    pool.become("pod-0", state=PodState.UNREACHABLE, reason="connection")
    assert pool.canary.stopped
    pool.end("pod-0")
    assert pool.canary.stopped


def test_pod_that_is_restarted_before_it_was_sent_anything_does_not(pool: Pool) -> None:
    pool.restart("pod-0")
    assert (pool.canary.stopped, len(pool.admitted())) == ("", 1)


def test_pod_that_is_deleted_does_not(pool: Pool) -> None:
    pool.send("pod-0")
    del pool.reports["pod-0"]
    pool.look()
    assert (pool.canary.stopped, pool.admitted()) == ("", ["pod-1"])


def test_another_process_in_the_same_container_is_a_death_too(pool: Pool) -> None:
    pool.send("pod-0")
    pool.become("pod-0", boot_id="another")
    assert "ended" in pool.canary.stopped


@pytest.mark.parametrize("reason", ["connection", "restarted", "malformed"])
def test_pod_that_breaks_off_stops_the_rollout(pool: Pool, reason: str) -> None:
    pool.send("pod-0")
    pool.become("pod-0", state=PodState.UNREACHABLE, reason=reason)
    assert "ended" in pool.canary.stopped


def test_ailing_pod_stops_the_rollout_and_one_that_recovers_lets_it_go_on(pool: Pool) -> None:
    pool.send("pod-0")
    pool.become("pod-0", digest=NEW, is_well=False, state=PodState.REJECTED, reason="ailing", message="no progress")
    assert pool.canary.stopped == "pod pod-0 does not take the document: no progress"
    pool.become("pod-0", is_well=True, state=PodState.APPLIED)
    assert (pool.canary.stopped, len(pool.admitted())) == ("", 4)


@pytest.mark.parametrize(
    "trouble",
    [
        {"state": PodState.REJECTED, "reason": "rejected", "message": "no"},
        {"state": PodState.REJECTED, "reason": "mismatch", "message": "no"},
        {"state": PodState.UNREACHABLE, "reason": "timeout"},
    ],
)
def test_two_that_do_not_take_it_stop_the_rollout_and_one_does_not(pool: Pool, trouble: Any) -> None:
    pool.send("pod-0")
    pool.become("pod-0", **trouble)
    assert (pool.canary.stopped, pool.admitted()) == ("", ["pod-1"])
    pool.send("pod-1")
    pool.become("pod-1", **trouble)
    assert pool.canary.stopped.startswith("pod pod-1 ")
    assert pool.admitted() == []


def test_only_pod_that_refuses_stops_the_rollout(make: Any) -> None:
    pool = Pool(make, 1)
    pool.send("pod-0")
    pool.become("pod-0", state=PodState.REJECTED, reason="rejected", message="no")
    assert pool.canary.stopped == "pod pod-0 does not take the document: no"


@pytest.mark.parametrize("reason", ["outdated", "refused", "unauthorized"])
def test_refusal_that_is_not_of_the_document_is_no_reason_to_stop(pool: Pool, reason: str) -> None:
    """A pod that lies about its epoch, or does not know the key yet."""
    for name, following in (("pod-0", ["pod-1"]), ("pod-1", ["pod-2"])):
        pool.send(name)
        pool.become(name, state=PodState.REJECTED, reason=reason)
        assert (pool.canary.stopped, pool.admitted()) == ("", following)


def test_pods_that_do_not_know_the_key_yet_are_passed_over_at_once_and_tried_when_they_do(make: Any) -> None:
    """The key was made anew, and the kubelet has not brought it to them yet."""
    pool = Pool(make, 2)
    for name in ("pod-0", "pod-1"):
        assert pool.admitted() == [name]
        pool.become(name, state=PodState.REJECTED, reason="unauthorized", is_well=False, outcome_of=VERSION)
    assert (pool.canary.stopped, pool.admitted()) == ("", [])
    pool.look()
    assert pool.admitted() == [], "nothing is new"
    pool.become("pod-1", is_well=True)  # it was asked, and answered
    assert pool.admitted() == ["pod-1"]


def test_all_may_be_asked_again_in_a_newer_version(make: Any) -> None:
    pool = Pool(make, 1)
    pool.send("pod-0")
    pool.become("pod-0", state=PodState.REJECTED, reason="outdated")
    assert pool.admitted() == []
    pool.look(version=Version(9, 1))
    assert pool.admitted() == ["pod-0"]


@pytest.mark.parametrize(("is_sent", "stops"), [(True, True), (False, False)])
def test_silence_is_not_waited_for(pool: Pool, is_sent: bool, stops: bool) -> None:
    for name in ("pod-0", "pod-1"):
        if is_sent:
            pool.send(name)
        pool.now += PATIENCE_SECONDS
        pool.look()
    assert bool(pool.canary.stopped) is stops
    assert pool.admitted() == ([] if stops else ["pod-2"])
    pool.become("pod-0", digest=NEW, is_well=True, state=PodState.APPLIED)
    assert (pool.canary.stopped, len(pool.admitted())) == ("", 4), "it was only slow"


def test_stopped_rollout_is_tried_again_ever_later(pool: Pool) -> None:
    for pause in (60, 120, 240, 480, 600, 600):
        [name] = pool.admitted()
        pool.send(name)
        pool.become(name, digest=OLD, is_well=False, state=PodState.REJECTED, reason="ailing")
        assert pool.canary.stopped
        pool.now += pause - 0.1
        pool.look()
        assert pool.canary.stopped
        pool.now += 0.1
        pool.look()
        assert not pool.canary.stopped


def test_pod_that_stopped_what_others_are_well_with_is_not_asked_first_again(pool: Pool) -> None:
    """One that is broken into could else hold up every change for a minute, also that which revokes a key."""
    pool.send("pod-0")
    pool.become("pod-0", state=PodState.UNREACHABLE, reason="connection")
    pool.reports["pod-0"] = replace(pool.reports["pod-0"], state=PodState.APPLIED, reason="")
    pool.now += 60
    pool.look()
    assert pool.admitted() == ["pod-1"], "another one is tried first"
    pool.become("pod-1", digest=NEW, sent=NEW, is_well=True)
    for name, report in pool.reports.items():
        pool.reports[name] = replace(report, digest=NEW, sent=NEW, state=PodState.APPLIED)
    pool.look(NEWER, Version(1, 3))
    assert pool.admitted(NEWER) == ["pod-1"], "and with the next document too"


def test_another_document_is_tried_at_once(pool: Pool) -> None:
    pool.send("pod-0")
    pool.restart("pod-0")
    pool.look(NEWER, Version(1, 3))
    assert (pool.canary.stopped, len(pool.admitted(NEWER))) == ("", 1)


def test_rollout_goes_on_when_the_pod_that_stopped_it_is_gone(pool: Pool) -> None:
    pool.send("pod-0")
    pool.restart("pod-0")
    del pool.reports["pod-0"]
    pool.look()
    assert (pool.canary.stopped, pool.admitted()) == ("", ["pod-1"])
