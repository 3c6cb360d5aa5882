"""Which statuses are written, in what order, and when they are looked at again."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from evenhand_operator.cache import Cache
from evenhand_operator.conditions import policy_programmed, policy_status
from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.reconcile import Plan
from evenhand_operator.reporter import Reporter
from evenhand_operator.settings import Settings
from evenhand_operator.signals import Signals
from evenhand_operator.status_writer import StatusChange
from evenhand_policy.errors import Reason, problem_of
from evenhand_policy.status import TenantPolicyStatus
from harness.builders import Notices, make_policy, make_pool

Json = dict[str, Any]
NOW = 1_800_000_000.0


class Stage:
    """A Reporter on policies of no pool. It writes into `batches`, of which the first `num_failing` fail; what is in
    `put_off` is not due."""

    def __init__(self) -> None:
        self.signals = Signals(Settings())
        self.cache = Cache(Notices())
        self.documents = SimpleNamespace(plan=Plan({}, {}), policies={}, offers={}, overlaps={})
        self.batches: list[list[str]] = []
        self.num_failing = 0
        self.put_off: set[str] = set()
        self.wrote = asyncio.Event()
        self.caught_up = asyncio.Event()
        self.caught_up.set()
        pusher = SimpleNamespace(is_settled=lambda pool: True)
        parts: Any = (self.cache, self.signals, self.documents, pusher, self, Settings(), self.caught_up, "ns/lease")
        self.reporter = Reporter(*parts)

    def is_due(self, change: StatusChange) -> bool:
        return change.is_needed and change.observed.key[1] not in self.put_off

    async def write(self, changes: list[StatusChange]) -> int:
        self.batches.append([change.observed.key[1] for change in changes])
        self.wrote.set()
        if len(self.batches) <= self.num_failing:
            return len(changes)
        for change in changes:
            assert isinstance(change.observed, ObservedPolicy)
            self.store(change.observed.key[1], change.observed.generation, change.status)
        return 0

    def store(self, name: str, generation: int = 1, status: Any = None) -> ObservedPolicy:
        """A policy as it is from now on."""
        before = self.cache.policies.get(f"uid-{name}")
        status = status if status is not None else before.status if before else TenantPolicyStatus()
        meta = {"version": next(_versions), "generation": generation}
        self.cache.policies.take(make_policy(name, meta=meta, status=msgspec.to_builtins(status)))
        observed = self.cache.policies.get(f"uid-{name}")
        assert observed
        return observed

    def compile(self) -> None:
        """As if a build had just taken everything in."""
        self.documents.policies = {each.uid: each for each in self.cache.policies}

    def due(self) -> list[str]:
        """Names of the policies whose statuses are not as they should be."""
        changes, num_later = self.reporter.changes(NOW)
        assert num_later == 0
        return [change.observed.key[1] for change in changes]

    async def run(self, until: Callable[[], bool]) -> None:
        """Let it run until that holds."""
        running = asyncio.create_task(self.reporter.run())
        self.signals.statuses_changed()
        async with asyncio.timeout(120):
            while not until():
                self.wrote.clear()
                await self.wrote.wait()
        running.cancel()


_versions = iter(range(1, 10**6))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Nothing is looked at again by the clock alone."""
    monkeypatch.setattr("evenhand_operator.reporter._LOOK_SECONDS", 3600)
    return Stage()


def right(observed: ObservedPolicy) -> TenantPolicyStatus:
    """The status that such a policy should have."""
    return policy_status(observed, (), None, policy_programmed(observed, (), None, None), NOW)


def test_status_of_an_edit_goes_before_those_that_are_only_inaccurate(stage: Stage) -> None:
    stale = right(stage.store("model"))
    for index in range(300):
        stage.store(f"p{index}", status=msgspec.structs.replace(stale, programmed_revision=9, conditions=()))
    stage.store("edited", generation=2, status=stale)
    stage.store("model", status=stale)
    stage.compile()
    changes, num_later = stage.reporter.changes(NOW)
    assert changes[0].observed.key[1] == "edited"
    assert len(changes) == 256
    assert num_later == 301 - 256, "of 302, one is right"


async def test_next_batch_does_not_wait_for_a_change(stage: Stage) -> None:
    for index in range(600):
        stage.store(f"p{index}")
    stage.compile()
    await stage.run(until=lambda: sum(map(len, stage.batches)) == 600)
    assert [len(batch) for batch in stage.batches] == [256, 256, 88]


async def test_thousands_wait_until_the_watch_has_begun(stage: Stage) -> None:
    for index in range(300):
        stage.store(f"p{index}")
    stage.compile()
    stage.caught_up.clear()
    running = asyncio.create_task(stage.reporter.run())
    stage.signals.statuses_changed()
    await stage.wrote.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(running), 0.3)
    assert [len(batch) for batch in stage.batches] == [256], "the most urgent ones"
    running.cancel()
    stage.caught_up.set()
    await stage.run(until=lambda: sum(map(len, stage.batches)) == 300)


async def test_what_failed_is_written_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_operator.reporter._LOOK_SECONDS", 0.01)
    stage.store("a")
    stage.compile()
    stage.num_failing = 2
    await stage.run(until=lambda: len(stage.batches) == 3)
    assert stage.batches == [["a"]] * 3


def test_what_is_put_off_holds_up_nobody_and_is_not_taken_for_right(stage: Stage) -> None:
    for name in ("a", "b"):
        stage.store(name)
    stage.compile()
    stage.put_off = {"a"}
    assert stage.due() == ["b"]
    stage.put_off.clear()
    assert sorted(stage.due()) == ["a", "b"]


def test_nothing_is_said_of_an_edit_that_was_not_compiled(stage: Stage) -> None:
    stage.store("new")
    assert stage.due() == []
    stage.compile()
    assert stage.due() == ["new"]
    stage.store("new", generation=2)
    assert stage.due() == []


def test_status_that_somebody_else_changed_is_put_right(stage: Stage) -> None:
    observed = stage.store("a")
    stage.compile()
    stage.store("a", status=right(observed))
    assert stage.due() == []
    stage.store("a", status=TenantPolicyStatus(observed_generation=1))
    assert stage.due() == ["a"]


def test_policy_that_has_come_to_have_a_problem_is_told_so(stage: Stage) -> None:
    observed = stage.store("a")
    stage.compile()
    stage.store("a", status=right(observed))
    assert stage.due() == []
    assert observed.policy
    problem = problem_of(observed.policy, Reason.SECRET_NOT_FOUND, "spec", "create it")
    stage.documents.plan = Plan({}, {observed.reference: (problem,)})
    assert stage.due() == ["a"]


def test_what_is_right_is_worked_out_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = stage.store("a")
    stage.compile()
    stage.store("a", status=right(observed))
    assert stage.due() == []
    monkeypatch.setattr("evenhand_operator.reporter.policy_status", None)
    assert stage.due() == stage.due() == []


def test_nothing_is_said_of_a_pool_that_was_not_compiled(stage: Stage) -> None:
    stage.cache.pools.take(make_pool(meta={"version": next(_versions)}))
    assert stage.due() == [], "it is about to be compiled"
    stage.cache.pools.take(make_pool(meta={"version": next(_versions), "generation": 2}, selector=7))
    assert stage.due() == ["default"], "that it cannot be read is known without"
