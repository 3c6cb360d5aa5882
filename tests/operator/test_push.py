"""Links: every pod is brought to what its pool offers, and kept there, whatever becomes of it."""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from evenhand_operator.objects import write_time
from evenhand_operator.pusher import Pusher
from evenhand_policy.config import Fairness
from evenhand_policy.push_document import understood_members
from evenhand_policy.status import PodState, PodStatus
from evenhand_policy.version import Version

POOL = ("inference", "default")
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]


def states(pusher: Pusher) -> dict[str, PodState]:
    return {report.pod.name: report.state for report in pusher.reports(POOL)}


async def test_every_pod_gets_the_newest(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    engines = [await engine(f"pod-{index}") for index in range(3)]
    pods = [make.pod(f"pod-{index}", each.url) for index, each in enumerate(engines)]
    pusher.sync(POOL, pods, make.offer(1), {})
    assert not pusher.is_settled(POOL)
    await changes.until(lambda: pusher.is_settled(POOL))
    assert set(states(pusher).values()) == {PodState.APPLIED}
    for revision in range(2, 9):  # faster than the pods answer
        pusher.sync(POOL, pods, make.offer(revision, weight=revision), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.revision for each in engines] == [8, 8, 8]
    assert pusher.num_pending == 0
    assert all(len(each.enforced) < 8 for each in engines), "what is outdated is not pushed"


async def test_pod_that_has_the_document_is_not_sent_it(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    """A new leader, another number of pods: one small request each."""
    engines = [await engine(f"pod-{index}") for index in range(3)]
    pods = [make.pod(f"pod-{index}", each.url) for index, each in enumerate(engines)]
    pusher.sync(POOL, pods, make.offer(1, num_replicas=2), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.drop(POOL)
    for each in engines:
        each.requests.clear()
    pusher.sync(POOL, pods, make.offer(1, epoch=2, num_replicas=2), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.requests for each in engines] == [["GET", "PATCH"]] * 3
    pusher.sync(POOL, pods, make.offer(2, epoch=2, num_replicas=3), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert [each.requests for each in engines] == [["GET", "PATCH", "PATCH"]] * 3
    assert [each.enforced[-1][1] for each in engines] == [3, 3, 3]


async def test_pod_that_enforces_what_is_offered_is_told_nothing(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.drop(POOL)
    stand_in.requests.clear()
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert (stand_in.requests, states(pusher)["pod-0"]) == (["GET"], PodState.APPLIED)


async def test_pool_that_is_dropped_is_left_alone(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pods = [make.pod("pod-0", stand_in.url), make.pod("lost", "http://127.0.0.1:1")]
    pusher.sync(POOL, pods, make.offer(1), {})
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.APPLIED)
    links = [task for task in asyncio.all_tasks() if task.get_name().startswith("push to ")]
    assert (len(links), pusher.num_pending) == (2, 1)
    pusher.drop(POOL)
    assert (pusher.reports(POOL), pusher.num_pending, POOL in pusher.pools()) == ([], 0, False)
    done, _ = await asyncio.wait(links, timeout=120)
    assert len(done) == 2 and all(task.cancelled() for task in done)


async def test_pod_that_comes_back_is_brought_up_to_date(
    pusher: Pusher, engine: Any, serve: Serve, make: Any, changes: Any
) -> None:
    stand_in = await engine()
    is_away = True

    async def sometimes(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503) if is_away else await stand_in.handle(request)

    pod = make.pod("pod-0", await serve(sometimes))
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.UNREACHABLE)
    assert (pusher.is_settled(POOL), pusher.num_pending) == (True, 1)
    is_away = False
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.APPLIED)
    assert stand_in.revision == 1


async def test_what_generates_is_told_and_told_anew(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    """A sidecar knows which engine it stands before only when that has started."""
    stand_in = await engine()
    stand_in.backend = "unknown"
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert pusher.reports(POOL)[0].backend == "unknown"
    stand_in.backend = "sglang"
    pusher.sync(POOL, [pod], make.offer(2), {})
    await changes.until(lambda: pusher.reports(POOL)[0].backend == "sglang")


async def test_restarted_pod_is_pushed_to_at_once(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    first_boot = pusher.reports(POOL)[0].boot_id
    stand_in.last_good.unlink()
    stand_in.restart()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url, restarts=1)], make.offer(1), {})
    assert states(pusher) == {"pod-0": PodState.PENDING}
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.revision == 1
    assert pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id != first_boot


async def test_process_that_took_another_s_place_is_proved_anew(
    pusher: Pusher, engine: Any, make: Any, changes: Any
) -> None:
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    stand_in.restart()
    stand_in.requests.clear()
    pusher.sync(POOL, [pod], make.offer(2), {})
    await changes.until(lambda: pusher.is_settled(POOL) and states(pusher)["pod-0"] is PodState.APPLIED)
    assert stand_in.requests == ["PATCH", "GET"], "what it answered to the first was not believed, but it had obeyed"
    assert pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id


@pytest.mark.parametrize("told", [{"weight": 9}, {"num_replicas": 7}, {"epoch": 2}])
async def test_pod_that_enforces_something_else_unseen_is_found_out(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    """Another document, another number of replicas: whatever differs from what was offered."""
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.05)
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    in_force = stand_in.receiver.in_force
    other = make.offer(1, **told)
    in_force.document = dataclasses.replace(
        in_force.document,
        assignment=other.assignment._replace(
            version=in_force.assignment.version if "epoch" not in told else Version(2, 1)
        ),
    )
    await changes.until(lambda: states(pusher)["pod-0"] is PodState.REJECTED)
    [report] = pusher.reports(POOL)
    assert report.reason == "outdated", "and the leader goes on above it"


async def test_pod_that_loses_its_config_unseen_is_found_out(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.05)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    stand_in.last_good.unlink()
    stand_in.restart()
    assert stand_in.revision == 0
    await changes.until(lambda: stand_in.revision == 1)
    assert pusher.reports(POOL)[0].boot_id == stand_in.receiver.boot_id


async def test_what_stays_the_same_is_not_told(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.pod_link.VERIFY_SECONDS", 0.01)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    told = changes.count
    await changes.until(lambda: len(stand_in.requests) >= 8)
    assert changes.count == told


async def test_gone_pod_is_left_alone(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.sync(POOL, [], make.offer(2), {})
    assert pusher.reports(POOL) == []
    assert pusher.is_settled(POOL)
    assert pusher.num_pending == 0


async def test_pod_that_moves_is_followed(pusher: Pusher, engine: Any, make: Any, changes: Any) -> None:
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", "http://127.0.0.1:1")], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: stand_in.revision == 1)


async def test_pod_is_not_sent_what_it_does_not_understand(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = understood_members() - {"tenants.fairness"}
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.understood_members", lambda: older)
    stand_in = await engine()
    pod = make.pod("pod-0", stand_in.url)
    pusher.sync(POOL, [pod], make.offer(1, fairness=Fairness.PER_USER), {})
    await changes.until(lambda: pusher.reports(POOL)[0].understands == older)
    assert not pusher.is_settled(POOL)
    pusher.sync(POOL, [pod], make.offer(2, fairness=Fairness.PER_USER, understood=older), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.requests.count("PUT") == 1
    assert stand_in.revision == 2


async def test_older_pod_is_sent_what_uses_nothing_newer(
    pusher: Pusher, engine: Any, make: Any, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: with nothing to leave out, no other document will be made for it."""
    older = understood_members() - {"tenants.fairness"}
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.understood_members", lambda: older)
    stand_in = await engine()
    pusher.sync(POOL, [make.pod("pod-0", stand_in.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))
    assert stand_in.revision == 1


@pytest.mark.parametrize(("started", "is_known"), [(-10, True), (10, False)])
async def test_new_leader_knows_what_the_last_one_wrote(
    pusher: Pusher, make: Any, started: int, is_known: bool
) -> None:
    """A container that started since then may have lost it."""
    now = time.time()
    row = PodStatus(name="pod-0", boot_id="b", epoch=3, revision=4, state=PodState.APPLIED, since=write_time(now))
    pod = make.pod("pod-0", started_at=now + started)
    pusher.sync(POOL, [pod], make.offer(), {"pod-0": row})
    assert pusher.reports(POOL)[0].enforced == ((3, 4) if is_known else None)
    assert pusher.reports(POOL)[0].state is PodState.PENDING
