"""Streams through the sidecar: events in any pieces, clients that leave, quotas that end."""

import asyncio

import pytest
from aiohttp import web

from evenhand_engine.dispatch import dispatcher
from evenhand_policy.config import Limits, SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash

from .conftest import (
    DONE,
    TEAM_KEY,
    WAIT_SECONDS,
    ScriptedUpstream,
    Sidecar,
    event,
    open_stream,
    say_three,
    usage_event,
)


async def test_a_stream_is_passed_on_event_by_event(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event("first"))
        await go_on.wait()
        await response.write(DONE)
        return response

    upstream.script = answer
    async with asyncio.timeout(WAIT_SECONDS), sidecar.post({"stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == event("first")
        go_on.set()
        assert await response.content.read() == DONE


async def test_a_client_that_leaves_is_charged_what_came_and_ends_it_upstream(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event() * 5)
        await asyncio.Event().wait()
        raise AssertionError

    upstream.script = answer
    async with sidecar.post({"stream": True, "messages": [{"role": "user", "content": "x" * 400}]}) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await sidecar.settled()
    async with asyncio.timeout(WAIT_SECONDS):
        while not upstream.num_cancelled:
            await asyncio.sleep(0.01)
    assert sidecar.tokens()[1] == 5 and sidecar.tokens()[0] > 100


async def test_a_client_that_leaves_before_a_whole_answer_is_charged_for_its_time(
    upstream: ScriptedUpstream, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever asks for long answers and leaves before their end would have them computed for nothing."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(dispatcher, "_UNSEEN_TOKENS_PER_SECOND", 10**9)
    upstream.script = answer
    asked = asyncio.create_task(sidecar.stream(stream=False, max_tokens=40))
    await sidecar.until(lambda: upstream.num_open == 1)
    await sidecar.until(lambda: sidecar.upstream.dispatcher.window.num_unstarted == 0)  # its prompt should be prefilled
    asked.cancel()
    await sidecar.settled()
    await sidecar.until(lambda: upstream.num_cancelled == 1)
    assert sidecar.tokens()[1] == 40


async def test_a_queued_client_that_leaves_sends_nothing(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    hold = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        await hold.wait()
        return await say_three(request)

    upstream.script = answer
    sidecar.upstream.dispatcher.window.batch_tokens = 1.0
    running = [asyncio.create_task(sidecar.stream()) for _ in range(2)]
    async with asyncio.timeout(WAIT_SECONDS):
        while upstream.num_open < 2:
            await asyncio.sleep(0.01)
        queued = asyncio.create_task(sidecar.stream())
        while sidecar.upstream.dispatcher.request_table.num_waiting != 1:
            await asyncio.sleep(0.01)
    queued.cancel()
    async with asyncio.timeout(WAIT_SECONDS):
        while sidecar.upstream.dispatcher.request_table.num_waiting:
            await asyncio.sleep(0.01)
    hold.set()
    await asyncio.gather(*running)
    assert len(upstream.received) == 2
    await sidecar.settled()


@pytest.mark.parametrize("num_bytes", [1, 7, 64])
async def test_events_may_come_in_any_pieces(upstream: ScriptedUpstream, sidecar: Sidecar, num_bytes: int) -> None:
    whole = event("é\n") + b": comment\r\n\r\n" + usage_event(9, 2) + event("z") + DONE

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        for start in range(0, len(whole), num_bytes):
            await response.write(whole[start : start + num_bytes])
            await asyncio.sleep(0)
        return response

    upstream.script = answer
    assert await sidecar.stream() == (200, whole.replace(usage_event(9, 2), b""))
    await sidecar.settled()
    assert sidecar.tokens() == (9, 2)


async def test_a_stream_ends_when_the_quota_is_used_up(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    """Without a limit of its own it reserves what is usual, and more while there is some: here for one of two."""
    both, one_is_cut = asyncio.Barrier(2), asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await both.wait()
        await response.write(event() * 300)
        await one_is_cut.wait()
        await response.write(DONE)
        return response

    upstream.script = answer
    team = TenantConfig(tenant_id="team", key_hashes=(key_hash(TEAM_KEY),), limits=Limits(tokens_per_minute=600))
    sidecar.apply(SchedulerConfig(tenants=(team,)))

    async def ask() -> bytes:
        async with sidecar.post({"stream": True}, headers={"Authorization": f"Bearer {TEAM_KEY}"}) as response:
            text = await response.read()
        one_is_cut.set()
        return bytes(text)

    texts = await asyncio.gather(ask(), ask())
    assert sorted(b'"tokens_per_minute"' in text for text in texts) == [False, True]
    assert 256 < upstream.body()["max_tokens"] < 600  # the most that the quota can ever give
    await sidecar.settled()
