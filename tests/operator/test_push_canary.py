"""A new document goes to one pod first, and what that pod does decides about the others."""

from typing import Any

import pytest

from evenhand_operator.pusher import Pusher
from evenhand_policy.push_document import DocumentRejectedError
from evenhand_policy.status import PodState

POOL = ("inference", "default")


async def start_pool(
    pusher: Pusher, engine: Any, make: Any, changes: Any, count: int = 4
) -> tuple[list[Any], list[Any]]:
    """Engines and pods that enforce revision 1."""
    engines = [await engine(f"pod-{index}") for index in range(count)]
    pods = [make.pod(f"pod-{index}", each.url) for index, each in enumerate(engines)]
    pusher.sync(POOL, pods, make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    for each in engines:
        each.requests.clear()
    return engines, pods


async def test_new_document_goes_to_one_pod_and_then_to_the_rest(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)
    engines[0].ailment = "the core does not enforce it yet"
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: engines[0].requests.count("GET") >= 5)  # it is watched over all the while
    assert [each.revision for each in engines] == [2, 1, 1, 1]
    assert not pusher.is_proven(POOL, make.offer(weight=5).document.digest)
    engines[0].ailment = None
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.revision for each in engines] == [2, 2, 2, 2]
    assert pusher.is_proven(POOL, make.offer(weight=5).document.digest)
    assert [each.requests.count("PUT") for each in engines] == [1, 1, 1, 1]


async def test_refusal_stops_the_rollout_until_there_is_another_document(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)
    pusher.sync(POOL, pods, make.offer(2, weight=0), {})
    await changes.until(lambda: bool(pusher.stopped(POOL)))
    assert pusher.stopped(POOL).startswith("pod pod-1 does not take the document: tenants[0].weight")
    asked = len(engines[1].requests)
    await changes.until(lambda: len(engines[1].requests) > asked)  # it is asked again, and again sent nothing
    assert [each.requests.count("PUT") > 0 for each in engines] == [True, True, False, False], (
        "the second was asked too"
    )
    pusher.sync(POOL, pods, make.offer(3, weight=5), {})
    await changes.until(lambda: all(each.revision == 3 for each in engines))
    assert pusher.stopped(POOL) == ""


async def test_pod_that_refuses_alone_keeps_nobody_from_the_document(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)

    def refuse(_: Any) -> None:
        raise DocumentRejectedError("tenants", "I do not want to")

    engines[0].receiver.in_force.on_change(refuse)
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: [each.revision for each in engines] == [1, 2, 2, 2])
    assert pusher.stopped(POOL) == ""
    await changes.until(lambda: pusher.reports(POOL)[0].state is PodState.REJECTED)


async def test_pod_that_is_ill_with_the_document_stops_the_rollout(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.LONGEST_TRIAL_SECONDS", 0.05)
    engines, pods = await start_pool(pusher, engine, make, changes)
    engines[0].ailment = "no progress"
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(
        lambda: pusher.stopped(POOL) == "pod pod-0 does not take the document: it is not well: no progress"
    )
    assert [each.revision for each in engines] == [2, 1, 1, 1]
    engines[0].ailment = None
    await changes.until(lambda: pusher.is_settled(POOL) and not pusher.stopped(POOL))
    assert [each.revision for each in engines] == [2, 2, 2, 2], "it was only slow"


@pytest.mark.parametrize("seen_by", ["the connection", "the container"])
async def test_pod_that_dies_of_the_document_stops_the_rollout(
    pusher: Pusher, engine: Any, make: Any, changes: Any, deleted: set[str], seen_by: str
) -> None:
    engines, pods = await start_pool(pusher, engine, make, changes)
    deaths = 0

    def die(config: Any) -> None:
        nonlocal deaths
        deaths += 1
        engines[0].restart()
        if seen_by == "the connection":
            raise RuntimeError

    engines[0].receiver.in_force.on_change(die)
    engines[0].ailment = "dying"
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: deaths == 1)
    pods[0] = make.pod("pod-0", engines[0].url, restarts=1)
    pusher.sync(POOL, pods, make.offer(2, weight=5), {})
    await changes.until(lambda: bool(pusher.stopped(POOL)))
    assert "ended when it was sent the document" in pusher.stopped(POOL)
    await changes.until(
        lambda: pusher.reports(POOL)[0].boot_id == engines[0].receiver.boot_id
    )  # the new process is asked
    assert [each.revision for each in engines] == [1, 1, 1, 1]
    deleted.add(pods[0].uid)
    pusher.sync(POOL, pods[1:], make.offer(2, weight=5), {})  # it was deleted: perhaps it was that
    await changes.until(lambda: [each.revision for each in engines[1:]] == [2, 2, 2])


async def test_new_pod_is_given_at_once_what_others_enforce(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    _, pods = await start_pool(pusher, engine, make, changes, 2)
    new = await engine("new")
    pusher.sync(POOL, [*pods, make.pod("new", new.url)], make.offer(2, num_replicas=3), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert new.requests == ["GET", "PUT"]
