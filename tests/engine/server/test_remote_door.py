"""A door in another process: both ends of its channel, here in one event loop."""

import asyncio
import time
from typing import Any

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend import remote_door
from evenhand_engine.frontend.claims import Demand
from evenhand_engine.frontend.door import Door, OwnDoor
from evenhand_engine.frontend.door_messages import Drain
from evenhand_policy.config import SchedulerConfig

from .joined_doors import DEMAND, KEY, WAIT_SECONDS, enter, joined, tenant


def bearer(key: str) -> "CIMultiDictProxy[str]":
    return CIMultiDictProxy(CIMultiDict({"Authorization": f"Bearer {key}"}))


@pytest.mark.parametrize("is_remote", [False, True])
async def test_what_is_told_is_settled_as_in_one_process(is_remote: bool) -> None:
    async with joined() as ends:
        door: Door = ends.door if is_remote else OwnDoor(ends.service)
        (claim,) = await door.reserve("t", Demand(prompt_lengths=(100,), max_tokens=300))
        assert (ends.in_flight, ends.num_in_flight) == (1, int(is_remote))
        now = time.monotonic()
        claim.started(30, now)
        claim.generated(1, now)
        claim.generated(1, now + 0.5)
        for _ in range(2):
            claim.ended("finished", "stop", 2, 0, now + 0.5)
        await ends.settle()
        assert (ends.in_flight, ends.num_in_flight) == (0, 0)
        text = ends.service.metrics.admin_text().decode()
        assert 'evenhand_tokens_total{kind="generation",tenant="t"} 2.0' in text
        assert 'evenhand_requests_total{outcome="finished",reason="stop",tenant="t"} 1.0' in text
        assert 'evenhand_inter_token_latency_seconds_sum{tenant="t"} 0.5' in text
        assert round(ends.tokens.level(now)) == 800 - 102


async def test_a_claim_that_outgrows_the_quota_is_told() -> None:
    async with joined() as ends:
        (claim,) = await ends.door.reserve("t", Demand(prompt_lengths=(100,)))
        await ends.door.reserve("t", Demand(prompt_lengths=(1,), max_tokens=440))
        exhausted = asyncio.Event()
        claim.exhausted = exhausted.set
        now = time.monotonic()
        claim.started(0, now)
        claim.generated(255, now)
        await ends.settle()
        assert not exhausted.is_set()
        claim.generated(1, now)
        claim.generated(256, now)
        await asyncio.wait_for(exhausted.wait(), WAIT_SECONDS)


async def test_who_leaves_before_the_answer_holds_nothing() -> None:
    async with joined() as ends:
        waits = [
            asyncio.ensure_future(ends.door.reserve("t", Demand(prompt_lengths=(10,), num_choices=2, max_tokens=5))),
            asyncio.ensure_future(enter(ends.door, "t", 50)),
        ]
        await asyncio.sleep(0)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        await ends.settle()
        assert (ends.in_flight, ends.num_in_flight, ends.service.bodies.num_bytes("t")) == (0, 0, 0)


async def test_what_a_lost_api_server_held_is_given_back() -> None:
    async with joined() as ends:
        (claim, _) = await ends.door.reserve("t", Demand(prompt_lengths=(100,), num_choices=2, max_tokens=100))
        await enter(ends.door, "t", 50)
        now = time.monotonic()
        claim.started(0, now)
        claim.generated(7, now)
        await ends.settle()
        assert ends.keeper.close() == 2
        assert (ends.in_flight, ends.num_in_flight, ends.service.bodies.num_bytes("t")) == (0, 0, 0)
        assert round(ends.tokens.level(now)) == 800 - 107, "what was computed is paid for"
        assert 'reason="api_server_dead",tenant="t"} 2.0' in ends.service.metrics.admin_text().decode()


async def test_a_config_is_current_once_the_api_server_says_so() -> None:
    async with joined() as ends:
        assert ends.door.authenticator.authenticate(bearer(KEY)) == "t"
        await ends.settle()
        assert ends.keeper.is_current
        new_key = "a-new-key-of-the-same-tenant-0"
        ends.keeper.enforce(SchedulerConfig(tenants=(tenant(new_key),)))
        assert not ends.keeper.is_current
        await ends.settle()
        assert ends.keeper.is_current
        assert ends.door.authenticator.authenticate(bearer(new_key)) == "t"
        with pytest.raises(Refusal):
            ends.door.authenticator.authenticate(bearer(KEY))


async def test_told_to_drain_and_left_alone() -> None:
    async with joined() as ends:
        ends.channel.send(Drain())
        await asyncio.wait_for(ends.door.told_to_stop.wait(), WAIT_SECONDS)
        assert ends.door.draining
        waiting = asyncio.ensure_future(enter(ends.door, "t"))
        ends.channel.close()
        await asyncio.wait({waiting}, timeout=WAIT_SECONDS)
        with pytest.raises(EngineDeadError):
            await enter(ends.door, "t")
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_call_that_fails_is_refused_and_the_others_are_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with joined() as ends:
        monkeypatch.delattr(ends.service, "bodies")
        with pytest.raises(Refusal) as caught:
            await enter(ends.door, "t", 1)
        assert caught.value.status == 500
        assert "failed" in caplog.text
        assert await ends.door.health() is None


async def test_an_owner_who_stands_still_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for him is refused; what he had admitted goes on here, and is given back there."""
    monkeypatch.setattr(remote_door, "_SILENCE_SECONDS", 0.02)
    async with joined() as ends:
        (claim, _) = await ends.door.reserve("t", Demand(prompt_lengths=(100,), num_choices=2, max_tokens=100))
        unread: list[object] = []
        monkeypatch.setattr(ends.keeper, "receive", unread.append)
        calls = (enter(ends.door, "t"), enter(ends.door, "t", 10), ends.door.reserve("t", DEMAND), ends.door.health())
        async with asyncio.timeout(WAIT_SECONDS):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [EngineDeadError] * 4
        assert len(unread) >= 4, "he was asked"
        assert ends.door.draining and ends.door.left_alone.is_set()
        assert "stands still" in caplog.text
        claim.started(0, time.monotonic())
        claim.generated(1, time.monotonic())
        claim.ended("finished", "stop", 1, 0, time.monotonic())
        await asyncio.wait_for(ends.lost.wait(), WAIT_SECONDS)
        ends.keeper.close()
        assert (ends.in_flight, ends.num_in_flight) == (0, 0)


async def test_a_machine_that_slept_is_no_owner_who_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    async with joined() as ends:
        unread: list[Any] = []
        with monkeypatch.context() as patched:
            patched.setattr(ends.keeper, "receive", unread.append)
            waiting = asyncio.ensure_future(enter(ends.door, "t"))
            while not unread:
                await asyncio.sleep(0)
        for _ in range(3):
            ends.door._note_silence()  # all at once, when it wakes; then he answers what he was asked
            ends.keeper.receive(unread[0])
            await ends.door.health()
        assert (await waiting)[1] == 1
        assert not ends.door.draining
