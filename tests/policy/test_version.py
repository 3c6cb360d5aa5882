"""The order of what engines are told: never back, always there in the end, whatever is lost, doubled or late."""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_policy.version import MAX_EPOCH, MAX_LEAD, Assignment, Verdict, Version, judge, may_be_overtaken

versions = st.builds(Version, st.integers(0, 4), st.integers(0, 4))
assignments = st.builds(Assignment, versions, st.sampled_from("ab"), st.integers(1, 2))


@given(assignments, assignments)
def test_engine_never_goes_back(in_force: Assignment, offered: Assignment) -> None:
    verdict = judge(in_force, offered)
    takes = verdict in (Verdict.RELABEL, Verdict.REPLACE)
    assert takes == (offered.version > in_force.version)
    assert (verdict is Verdict.IN_FORCE) == (offered == in_force)
    assert (verdict is Verdict.REPLACE) == (takes and offered.digest != in_force.digest)


@pytest.mark.parametrize(
    ("seen", "own", "expected"),
    [
        (2, 1, True),
        (1 + MAX_LEAD, 1, True),
        (2 + MAX_LEAD, 1, False),
        (2**63 - 1, 1, False),
        (MAX_EPOCH + 1, MAX_EPOCH, False),
    ],
)
def test_what_may_be_overtaken_is_bounded(seen: int, own: int, expected: bool) -> None:
    assert may_be_overtaken(Version(seen, 9), Version(own, 1)) is expected


# ---- the protocol, exhaustively, in small scope
#
# Two leaders, of which the second overtakes the first at any moment while the first does not know and goes on, each with
# three documents to tell, of which one is the first again; two pods that crash, and come back with what they had last or
# with nothing. A message may be lost (it is never delivered), doubled, late and in any order: whatever a leader could
# ever have sent may reach any pod at any time.


class World(NamedTuple):
    """Everything that decides what can happen next: what each pod enforces, the epoch of each leader (0: it does not lead
    yet), how many changes each has seen, and how many crashes there were."""

    pods: tuple[Assignment, ...]
    epochs: tuple[int, ...]
    changes: tuple[int, ...]
    crashes: int


NOTHING = Assignment(Version(0, 0), "", 1)
TOLD = (("a", 1), ("b", 1), ("a", 2))
"""Document and number of replicas by change."""
MOST_CRASHES = 2


def told(world: World, leader: int, change: int) -> Assignment:
    """What a leader tells the pods after so many changes; each leader begins elsewhere."""
    document, replicas = TOLD[(change + leader) % len(TOLD)]
    return Assignment(Version(world.epochs[leader], change + 1), document, replicas)


def deliver(in_force: Assignment, method: str, assignment: Assignment) -> Assignment:
    """What the engine enforces then."""
    verdict = judge(in_force, assignment)
    takes = verdict is Verdict.RELABEL or (verdict is Verdict.REPLACE and method == "PUT")
    return assignment if takes else in_force


def successors(world: World) -> Iterator[World]:
    """All that can happen next."""
    for leader, epoch in enumerate(world.epochs):
        if not epoch:  # it takes the Lease: its epoch is higher than any before
            yield world._replace(epochs=replaced(world.epochs, leader, max(world.epochs) + 1))
            continue
        if world.changes[leader] < len(TOLD) - 1:
            yield world._replace(changes=replaced(world.changes, leader, world.changes[leader] + 1))
        for change in range(world.changes[leader] + 1):
            for method in ("PUT", "PATCH"):
                for place, in_force in enumerate(world.pods):
                    after = deliver(in_force, method, told(world, leader, change))
                    yield world._replace(pods=replaced(world.pods, place, after))
    for place in range(len(world.pods) if world.crashes < MOST_CRASHES else 0):
        for kept in (world.pods[place], NOTHING):  # the container is started anew, or the Pod is another one
            yield world._replace(pods=replaced(world.pods, place, kept), crashes=world.crashes + 1)


def replaced(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


def converge(world: World, in_force: Assignment) -> Assignment:
    """What a pod enforces once the latest leader has asked where it is and told it what it lacks."""
    leader = max(range(2), key=lambda each: world.epochs[each])
    newest = told(world, leader, world.changes[leader])
    return deliver(in_force, "PATCH" if in_force.digest == newest.digest else "PUT", newest)


def test_protocol_never_rolls_back_and_always_converges() -> None:
    first = World((NOTHING, NOTHING), (1, 0), (0, 0), 0)
    seen, queue = {first}, deque([first])
    while queue:
        world = queue.popleft()
        leader = max(range(2), key=lambda each: world.epochs[each])
        newest = told(world, leader, world.changes[leader])
        assert [converge(world, in_force) for in_force in world.pods] == [newest, newest]
        for following in successors(world):
            for before, after in zip(world.pods, following.pods, strict=True):
                if after.version < before.version:
                    assert following.crashes > world.crashes, "only a pod that lost what it had goes back"
                    assert after == NOTHING
                if after.version == before.version:
                    assert after == before, "a version stands for one thing"
            if following not in seen:
                seen.add(following)
                queue.append(following)
    assert len(seen) > 700
