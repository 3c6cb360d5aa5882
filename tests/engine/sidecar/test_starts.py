"""One request begins in each turn of the loop: a burst of them holds up nobody's stream, and no tenant's burst another's request."""

import asyncio

import pytest

from evenhand_engine.sidecar.starts import Starts

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, Sidecar, event, say_three


class Turns:
    """Notes in which turn of the loop, counted from the first, each request begins."""

    def __init__(self) -> None:
        self.starts = Starts()
        self.begun: list[tuple[int, str]] = []
        self._number = 0
        self._count()

    def _count(self) -> None:
        self._number += 1
        asyncio.get_running_loop().call_soon(self._count)

    def ask(self, name: str) -> asyncio.Task[None]:
        """`name`: its first letter is the tenant."""

        async def begin() -> None:
            await self.starts.turn(name[0])
            self.begun.append((self._number, name))

        return asyncio.create_task(begin())


async def test_one_alone_waits_for_nothing() -> None:
    starts = Starts()
    for _ in range(3):
        with pytest.raises(StopIteration):
            starts.turn("a").send(None)
        await asyncio.sleep(0)


async def test_of_many_one_begins_in_each_turn_and_tenants_take_turns() -> None:
    turns = Turns()
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(*map(turns.ask, ["a1", "a2", "a3", "a4", "b1", "c1", "b2"]))
    numbers, names = zip(*turns.begun, strict=True)
    assert list(names) == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    assert len(set(numbers)) == len(numbers)


async def test_whoever_leaves_gives_up_its_place_and_no_turn() -> None:
    turns = Turns()
    tasks = [turns.ask(name) for name in ("a1", "a2", "a3", "b1")]
    await asyncio.sleep(0)
    for task in tasks[1:3]:
        task.cancel()
    async with asyncio.timeout(WAIT_SECONDS):
        await tasks[3]
        await turns.ask("a4")
    assert [name for _, name in turns.begun] == ["a1", "b1", "a4"]
    assert not turns.starts._queues


async def test_what_computes_waits_to_begin_and_nothing_else(
    upstream: ScriptedUpstream, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = say_three
    front = sidecar.running.front
    assert front is not None
    asked, may_begin = list[str](), asyncio.Event()

    async def turn(tenant_id: str) -> None:
        asked.append(tenant_id)
        await may_begin.wait()

    monkeypatch.setattr(front.starts, "turn", turn)
    waiting = asyncio.create_task(sidecar.stream())
    await sidecar.until(lambda: asked == ["default"])
    async with sidecar.session.get(sidecar.url + "/v1/models") as response:
        assert response.status == 200, "what computes nothing waits for no turn"
    assert [path for path, _, _ in upstream.received] == ["/v1/models"]
    may_begin.set()
    assert await waiting == (200, event() * 3 + DONE)
    await sidecar.settled()
