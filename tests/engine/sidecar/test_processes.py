"""A sidecar of several processes: what tenants share is decided once, whichever process their clients reached."""

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from evenhand_policy.config import Limits

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, Sidecar, Start, event, open_stream
from .pinned_clients import Gate, Pinned, api_pids, begin, config, connect_each, until_status

Connect = Callable[[Sidecar, int], Any]


@pytest.fixture
async def connect(upstream: ScriptedUpstream) -> AsyncIterator[Connect]:
    """`connect(sidecar, n)`: lists of `n` clients each, one list for each of two processes."""
    async with contextlib.AsyncExitStack() as stack:
        yield lambda sidecar, num_clients: connect_each(stack, sidecar.url, num_clients)


@pytest.fixture
def gate(upstream: ScriptedUpstream) -> Gate:
    upstream.script = scripted = Gate()
    return scripted


async def test_the_order_is_that_of_one_process(
    upstream: ScriptedUpstream, start: Start, connect: Connect, gate: Gate
) -> None:
    """Two tenants, each in a process of its own, before an upstream with one seat: by weights, as where there is one process."""
    orders = []
    for num_processes in (2, 1):
        sidecar = await start(upstream.url, max_num_seqs=1, api_server_count=num_processes)
        sidecar.apply(config(a={"weight": 3}, b={"weight": 1}))
        gate.came.clear()
        if num_processes == 2:
            light, heavy = await connect(sidecar, 9)
        else:
            light = heavy = [Pinned(sidecar.url, sidecar.session, 0)] * 9
        tasks = [await begin(sidecar, light[8], "b", f"first {num_processes}")]
        for number in range(8):
            tasks.append(await begin(sidecar, light[number], "b", f"b {number} {num_processes}"))
            tasks.append(await begin(sidecar, heavy[number], "a", f"a {number} {num_processes}"))
        for number in range(len(tasks)):
            await sidecar.until(lambda number=number: len(gate.came) == number + 1)
            gate.open(gate.came[number])
        async with asyncio.timeout(WAIT_SECONDS):
            assert {status for status, _ in await asyncio.gather(*tasks)} == {200}
        await sidecar.settled()
        orders.append([user[:3] for user in gate.came])
    assert orders[0] == orders[1]
    assert Counter(user[0] for user in orders[0][1:9])["a"] >= 5, "three of four, but for what runs already"


async def test_quotas_are_granted_once(upstream: ScriptedUpstream, start: Start, connect: Connect, gate: Gate) -> None:
    sidecar = await start(upstream.url, api_server_count=2)
    limits = {
        "requests": Limits(requests_per_minute=6),
        "tokens": Limits(tokens_per_minute=1000),
        "few": Limits(max_concurrent_requests=2),
        "queue": Limits(max_concurrent_requests=1, max_queued_requests=2),
    }
    sidecar.apply(config(**{tenant_id: {"limits": limit} for tenant_id, limit in limits.items()}))
    clients = [client for part in await connect(sidecar, 6) for client in part]
    accounts = sidecar.service.admission.accounts
    for tenant_id in ("requests", "tokens"):
        bucket = getattr(accounts[tenant_id], tenant_id)
        bucket.rate = 1e-9  # the machine may be slow

    gate.open("x")
    async with asyncio.timeout(WAIT_SECONDS):
        answers = await asyncio.gather(*(client.ask("requests", "x") for client in clients))
        assert Counter(status for status, _ in answers) == {200: 6, 429: 6}
        reserving = [asyncio.create_task(client.ask("tokens", "t", max_tokens=400)) for client in clients]
        await sidecar.until(lambda: sum(task.done() for task in reserving) == 10)
        gate.open("t")
        assert Counter(status for status, _ in await asyncio.gather(*reserving)) == {200: 2, 429: 10}
        waiting = [asyncio.create_task(client.ask("few", "y")) for client in clients]
        await sidecar.until(lambda: accounts["few"].num_in_flight == 12 and gate.came.count("y") == 2)
        assert upstream.num_open == 2
        gate.open("y")
        assert {status for status, _ in await asyncio.gather(*waiting)} == {200}
        queued = [asyncio.create_task(client.ask("queue", "z")) for client in clients]
        await sidecar.until(lambda: sum(task.done() for task in queued) == 9)
        gate.open("z")
        assert Counter(status for status, _ in await asyncio.gather(*queued)) == {200: 3, 429: 9}
    await sidecar.settled()


async def test_both_ends_may_leave(upstream: ScriptedUpstream, start: Start, connect: Connect, gate: Gate) -> None:
    sidecar = await start(upstream.url, api_server_count=2)
    sidecar.apply(config(a={}))
    gate.open("first")
    for [client] in await connect(sidecar, 1):
        assert (await client.ask("a", "first"))[0] == 200
        await sidecar.settled()
        num_cancelled, before = upstream.num_cancelled, sidecar.tokens("a")
        async with client.post("a", f"u{client.pid}") as response:
            assert await response.content.readuntil(b"\n\n") == event()
            response.close()
        await sidecar.until(lambda num=num_cancelled: upstream.num_cancelled == num + 1)
        await sidecar.settled()
        num_prompt, num_outputs = sidecar.tokens("a")
        assert num_prompt > before[0] and num_outputs == before[1] + 1, "it is charged what came"

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event())
        assert request.transport is not None
        request.transport.abort()
        return response

    upstream.script = break_off
    for [client] in await connect(sidecar, 1):
        status, text = await client.ask("a")
        assert status == 200 and b"upstream_error" in text and b"[DONE]" not in text
    await sidecar.settled()


async def test_a_process_that_is_killed_takes_nothing_with_it(
    upstream: ScriptedUpstream, start: Start, connect: Connect, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """Its seats are free, what came is charged, nobody of those who waited is sent, and the others go on."""
    sidecar = await start(upstream.url, api_server_count=2, max_num_seqs=2)
    sidecar.apply(config(a={}, b={}))
    lost, kept = await connect(sidecar, 3)
    account = sidecar.service.admission.account
    streams = [await begin(sidecar, lost[0], "a", "lost"), await begin(sidecar, kept[0], "b", "kept")]
    await sidecar.until(lambda: sorted(gate.came) == ["kept", "lost"] and sidecar.tokens("a")[1] == 1)
    streams += [await begin(sidecar, client, "a", "never") for client in lost[1:]]
    next_one = await begin(sidecar, kept[1], "b", "next")
    charged, before = sidecar.tokens("a"), api_pids()
    os.kill(lost[0].pid, signal.SIGKILL)
    await sidecar.until(lambda: account("a").num_in_flight == 0)
    await sidecar.until(lambda: "next" in gate.came)
    assert sidecar.tokens("a") == charged and "never" not in gate.came
    await sidecar.until(lambda: upstream.num_cancelled == 1)
    gone = await asyncio.gather(streams[0], *streams[2:], return_exceptions=True)
    assert all(isinstance(error, aiohttp.ClientError) for error in gone), gone
    gate.open("kept")
    gate.open("next")
    async with asyncio.timeout(WAIT_SECONDS):
        for task in (streams[1], next_one):
            status, text = await task
            assert status == 200 and text.endswith(DONE)
    await sidecar.settled()
    assert b'reason="api_server_dead",tenant="a"} 3.0' in sidecar.service.metrics.admin_text()
    await sidecar.until(lambda: len(api_pids() - before) == 1)
    assert "an API server died" in caplog.text
    gate.open("again")
    for [client] in await connect(sidecar, 1):
        assert (await client.ask("a", "again"))[0] == 200


async def test_a_policy_and_a_drain_are_in_force_in_all(
    upstream: ScriptedUpstream, start: Start, connect: Connect, gate: Gate
) -> None:
    sidecar = await start(upstream.url, api_server_count=2)
    sidecar.apply(config(a={}))
    clients = [client for part in await connect(sidecar, 2) for client in part]
    gate.open("short")
    for client in clients:
        assert (await client.ask("a", "short"))[0] == 200
        assert (await client.ask("b", "short"))[0] == 401
        assert (await client.get("/ready"))[0] == 200
    sidecar.apply(config(b={}))
    await sidecar.until(lambda: sidecar.service.ailment() is None)
    for client in clients:
        assert (await client.ask("a", "short"))[0] == 401
        assert (await client.ask("b", "short"))[0] == 200
    streams = [await begin(sidecar, client, "b", "long") for client in clients[::2]]
    await sidecar.until(lambda: gate.came.count("long") == 2)

    async def wait_for_the_drain() -> int:
        async with sidecar.session.get(sidecar.admin_url + "/drained") as response:
            return response.status

    hook = asyncio.create_task(wait_for_the_drain())
    sidecar.running.drain()
    for client in clients[1::2]:
        await until_status(client, 503)
        assert (await client.ask("b", "short"))[0] == 503
    assert not hook.done()
    gate.open("long")
    async with asyncio.timeout(WAIT_SECONDS):
        assert [status for status, _ in await asyncio.gather(*streams)] == [200, 200]
        assert await hook == 200
        await sidecar.running.wait_until_idle()


async def test_what_outlasts_a_drain_ends_with_a_reason(
    upstream: ScriptedUpstream, start: Start, connect: Connect, gate: Gate
) -> None:
    sidecar = await start(upstream.url, api_server_count=2)
    sidecar.apply(config(a={}))
    streams = [await begin(sidecar, client, "a", "long") for [client] in await connect(sidecar, 1)]
    await sidecar.until(lambda: gate.came.count("long") == 2)
    sidecar.running.drain()
    await sidecar.running.cut()
    async with asyncio.timeout(WAIT_SECONDS):
        for status, text in await asyncio.gather(*streams):
            assert status == 200 and text.startswith(event()) and b'"draining"' in text, (
                "it is not the engine that failed"
            )
        await sidecar.running.wait_until_idle()
    await sidecar.settled()


async def test_metrics_are_of_all_processes_whichever_is_asked(
    upstream: ScriptedUpstream, start: Start, connect: Connect, gate: Gate
) -> None:
    upstream.metrics = "vllm:num_requests_waiting 7\n"
    sidecar = await start(upstream.url, api_server_count=2)
    sidecar.apply(config(a={}))
    clients = [client for [client] in await connect(sidecar, 1)]
    streams = [await begin(sidecar, client, "a", "long") for client in clients]
    await sidecar.until(lambda: gate.came.count("long") == 2 and sidecar.tokens("a")[1] == 2)
    for [client] in await connect(sidecar, 1):
        await sidecar.until(lambda: bool(sidecar.upstream.metrics_text))
        status, text = await client.get("/metrics")
        assert status == 200
        assert "vllm:num_requests_waiting 7" in text and "evenhand_sidecar_inflight_requests 2.0" in text
        assert 'tenant="a"' not in text
    gate.open("long")
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(*streams)
    await sidecar.settled()
    text = sidecar.service.metrics.admin_text().decode()
    assert 'evenhand_requests_total{outcome="finished",reason="stop",tenant="a"} 2.0' in text
    assert 'evenhand_tokens_total{kind="generation",tenant="a"} 4.0' in text
