"""Who waits for whom, and who is asked how often."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from evenhand_operator.engine_client import PushError
from evenhand_operator.objects import EnginePod
from evenhand_operator.offer import Offer
from evenhand_operator.pod_link import VERIFY_SECONDS
from evenhand_operator.pusher import MAX_LOST, MAX_NEW, MAX_PROVEN, Pusher
from evenhand_policy.push_protocol import EngineReport
from evenhand_policy.status import PodState
from evenhand_policy.version import Assignment, Version
from harness.virtual_time import VirtualTime

POOL = ("inference", "default")
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]


async def test_unreachable_pods_do_not_hold_up_the_others(
    pusher: Pusher, engine: Any, serve: Serve, make: Any, changes: Any
) -> None:
    good = await engine("good")
    pusher.sync(POOL, [make.pod("good", good.url)], make.offer(1), {})
    await changes.until(lambda: pusher.is_settled(POOL))

    async def swallow(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("cancelled before")

    black_hole = await serve(swallow)
    lost = [make.pod(f"lost-{index}", black_hole) for index in range(MAX_PROVEN + MAX_NEW + MAX_LOST)]
    pusher.sync(POOL, [*lost, make.pod("good", good.url)], make.offer(2, weight=5), {})
    await changes.until(lambda: good.revision == 2)
    await changes.until(lambda: pusher.num_pending == len(lost))
    assert not any(report.outcome_of for report in pusher.reports(POOL) if report.pod.name != "good")


class Distant:
    """Stands for EngineClient: pods enforce what they are told after a moment; those that are lost take five seconds to be
    given up.

    Attributes:
        requests: methods of what was asked, in order.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._enforced = {"": Assignment(Version(0, 0), "", 1)}

    async def read(self, pod: EnginePod, _: Offer) -> EngineReport:
        self.requests.append("GET")
        await asyncio.sleep(5 if pod.name.startswith("lost") else 0.01)
        if pod.name.startswith("lost"):
            raise PushError(PodState.UNREACHABLE, "timeout", "no complete answer in time")
        (epoch, revision), digest, num_replicas = self._enforced.get(pod.name, self._enforced[""])
        return EngineReport(
            boot_id="b", epoch=epoch, revision=revision, digest=digest, source="Push", num_replicas=num_replicas
        )

    async def relabel(self, pod: EnginePod, offer: Offer, _: str) -> EngineReport:
        return await self._tell("PATCH", pod, offer)

    async def send(self, pod: EnginePod, offer: Offer, _: str) -> EngineReport:
        return await self._tell("PUT", pod, offer)

    async def _tell(self, method: str, pod: EnginePod, offer: Offer) -> EngineReport:
        self._enforced[pod.name] = offer.assignment
        report = await self.read(pod, offer)
        self.requests[-1] = method
        return report


def play(virtual_time: VirtualTime, scenario: Callable[[Pusher, Distant], Awaitable[None]]) -> None:
    """A scenario with distant pods; it takes no time, however long it is."""

    async def run() -> None:
        client: Any = Distant()
        async with asyncio.TaskGroup() as tasks:
            pusher = Pusher(client, tasks, lambda *_: None, lambda _: True, virtual_time.clock)
            await scenario(pusher, client)
            pusher.drop(POOL)

    virtual_time.run(run())


def states(pusher: Pusher) -> dict[str, PodState]:
    return {report.pod.name: report.state for report in pusher.reports(POOL)}


def test_new_pods_do_not_queue_behind_lost_ones(virtual_time: VirtualTime, make: Any) -> None:
    """However many of those there are."""

    async def scenario(pusher: Pusher, _: Distant) -> None:
        lost = [make.pod(f"lost-{index}") for index in range(16 * MAX_LOST)]
        pusher.sync(POOL, lost, make.offer(1), {})
        await asyncio.sleep(200)
        assert set(states(pusher).values()) == {PodState.UNREACHABLE}
        pusher.sync(POOL, [*lost, make.pod("new")], make.offer(1), {})
        await asyncio.sleep(0.5)
        assert states(pusher)["new"] is PodState.APPLIED

    play(virtual_time, scenario)


def test_pod_that_enforces_the_newest_is_left_alone_until_it_is_asked(virtual_time: VirtualTime, make: Any) -> None:
    async def scenario(pusher: Pusher, client: Distant) -> None:
        for revision in (1, 2):
            pusher.sync(POOL, [make.pod("pod-0")], make.offer(revision, weight=revision), {})
            await asyncio.sleep(1)
            assert states(pusher) == {"pod-0": PodState.APPLIED}
        asked = len(client.requests)
        await asyncio.sleep(0.75 * VERIFY_SECONDS)
        assert client.requests[asked:] == []
        await asyncio.sleep(0.5 * VERIFY_SECONDS)
        assert client.requests[asked:] == ["GET"]

    play(virtual_time, scenario)


def test_pod_that_is_not_ready_yet_is_pushed_to(virtual_time: VirtualTime, make: Any) -> None:
    """It becomes ready by that; then it is the same pod, and asked nothing again."""

    async def scenario(pusher: Pusher, client: Distant) -> None:
        pusher.sync(POOL, [make.pod("pod-0", ready=False)], make.offer(1), {})
        await asyncio.sleep(1)
        assert (states(pusher), client.requests[:2]) == ({"pod-0": PodState.APPLIED}, ["GET", "PUT"])
        asked = len(client.requests)
        pusher.sync(POOL, [make.pod("pod-0")], make.offer(1), {})
        assert pusher.reports(POOL)[0].pod.ready_since is not None
        await asyncio.sleep(0.75 * VERIFY_SECONDS)
        assert client.requests[asked:] == []

    play(virtual_time, scenario)
