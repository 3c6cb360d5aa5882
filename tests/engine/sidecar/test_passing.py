"""Requests through the sidecar: what is added, hidden, refused, and whom they may reach."""

import asyncio
import gzip
import json
from pathlib import Path

import aiohttp
from aiohttp import web
from yarl import URL

from evenhand_policy.config import LatencyClass, Limits, SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash

from .conftest import (
    DONE,
    TEAM_KEY,
    WAIT_SECONDS,
    ScriptedUpstream,
    Sidecar,
    Start,
    event,
    open_stream,
    say_three,
    usage_event,
)


async def test_usage_is_asked_for_and_hidden(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    upstream.script = say_three
    status, text = await sidecar.stream()
    assert (status, text) == (200, event() * 3 + DONE)
    assert upstream.body()["stream_options"] == {"include_usage": True}
    await sidecar.settled()
    assert sidecar.tokens() == (7, 3)


async def test_usage_is_shown_to_whoever_asks(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    upstream.script = say_three
    _, text = await sidecar.stream(stream_options={"include_usage": True, "other": 1})
    assert usage_event(11, 3, 4) in text
    assert upstream.body()["stream_options"] == {"include_usage": True, "other": 1}


async def test_bodies_that_need_no_change_are_not_written_anew(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})

    upstream.script = answer
    raw = b'{"messages" : [],  "unknown":{"a":1.50}, "messages":[]}'
    async with sidecar.session.post(
        URL(sidecar.url + "/v1/chat/completions?x=%2F", encoded=True),
        data=raw,
        headers={"Content-Type": "application/json", "X-Other": "1"},
    ) as response:
        assert (await response.json())["usage"]["completion_tokens"] == 2
    path, headers, body = upstream.received[-1]
    assert (path, body, headers["X-Other"]) == ("/v1/chat/completions?x=%2F", raw, "1")
    assert headers["X-Request-Id"] == response.headers["X-Request-Id"]
    await sidecar.settled()
    assert sidecar.tokens() == (5, 2)


async def test_a_clients_priority_and_key_do_not_reach_the_upstream(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    priorities = []

    async def answer(request: web.Request) -> web.StreamResponse:
        priorities.extend(errand.priority for errand in sidecar.upstream.dispatcher.request_table.requests.values())
        return await say_three(request)

    upstream.script = answer
    async with sidecar.post(
        {"messages": [], "stream": True, "priority": -5, "kept": 1},
        headers={"Authorization": "Bearer secret", "x-api-key": "s"},
    ) as response:
        await response.read()
    assert priorities == [-5], "it orders here"
    assert "priority" not in upstream.body() and upstream.body()["kept"] == 1
    assert not {"Authorization", "x-api-key"} & set(upstream.received[-1][1])


async def test_caches_are_salted_by_tenant_and_priorities_set_by_class(
    upstream: ScriptedUpstream, start: Start
) -> None:
    sidecar = await start(upstream.url, salts_caches=True, priority="vllm")
    team = TenantConfig(tenant_id="team", key_hashes=(key_hash(TEAM_KEY),), latency_class=LatencyClass.BATCH)
    sidecar.apply(SchedulerConfig(tenants=(team,)))
    upstream.script = say_three
    for headers in ({}, {"Authorization": f"Bearer {TEAM_KEY}"}):
        async with sidecar.post({"stream": True, "cache_salt": "mine"}, headers=headers) as response:
            await response.read()
    default, teams = upstream.body(0), upstream.body(1)
    assert len({"mine", default["cache_salt"], teams["cache_salt"]}) == 3
    assert default["priority"] < teams["priority"]


async def test_tenants_are_proved_and_limited_as_in_the_engine(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    team = TenantConfig(
        tenant_id="team", key_hashes=(key_hash(TEAM_KEY),), limits=Limits(requests_per_minute=1, max_output_tokens=7)
    )
    sidecar.apply(SchedulerConfig(tenants=(team,)))
    upstream.script = say_three
    key = {"Authorization": f"Bearer {TEAM_KEY}"}
    async with sidecar.post({"stream": True}, headers=key) as response:
        assert response.status == 200
        await response.read()
    assert upstream.body()["max_tokens"] == 7
    async with sidecar.post({"stream": True}, headers=key) as response:
        assert (response.status, response.headers["X-Evenhand-Reason"]) == (429, "requests_per_minute")
        assert int(response.headers["Retry-After"]) >= 1
    async with sidecar.post({"stream": True, "max_tokens": 8}, headers=key) as response:
        assert response.status in (400, 429)
    async with sidecar.post({"stream": True}, headers={"Authorization": "Bearer wrong"}) as response:
        assert response.status == 401
    async with sidecar.session.get(sidecar.admin_url + "/v1/tenants") as response:
        (row,) = [t for t in (await response.json())["tenants"] if t["tenantId"] == "team"]
    assert row["refusals"]["requests_per_minute"] >= 1


async def test_other_paths_pass_and_those_that_change_the_engine_do_not(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    async with sidecar.session.get(sidecar.url + "/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "m"

    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read(), headers={"X-Kept": "1", "Content-Type": "audio/wav"})

    upstream.script = echo
    async with sidecar.session.post(
        sidecar.url + "/v1/audio/anything", data=b"w" * 2**20, headers={"Content-Type": "audio/wav"}
    ) as response:
        assert (await response.read(), response.headers["X-Kept"]) == (b"w" * 2**20, "1")
    async with sidecar.session.post(
        sidecar.url + "/v1/audio/anything",
        data=gzip.compress(b"w" * 100),
        headers={"Content-Type": "audio/wav", "Content-Encoding": "gzip"},
    ) as response:
        assert await response.read() == b"w" * 100, "what is streamed lost its encoding on the way"
    for path in ("/flush_cache", "//flush_cache", "/sleep", "/v1/load_lora_adapter", "/v1/../flush_cache", "/%73leep"):
        async with sidecar.session.post(sidecar.url + path, json={}) as response:
            assert response.status == 403, path
    assert len(upstream.received) == 3
    await sidecar.settled()


async def test_probes_and_metrics_tell_of_the_upstream(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    upstream.metrics = (
        'vllm:num_requests_waiting{model_name="m"} 3.0\n'
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
    )
    async with asyncio.timeout(WAIT_SECONDS):
        while sidecar.upstream.dispatcher.window.kv_tokens == float("inf"):
            await asyncio.sleep(0.05)
    assert sidecar.upstream.dispatcher.window.kv_tokens == 0.95 * 1_600
    async with sidecar.session.get(sidecar.url + "/ready") as response:
        assert response.status == 200
    async with sidecar.session.get(sidecar.url + "/metrics") as response:
        text = await response.text()
    assert "vllm:num_requests_waiting" in text and "evenhand_sidecar_upstream_up 1.0" in text
    await sidecar.until(lambda: sidecar.upstream.connection.backend == "vllm")
    async with sidecar.session.get(sidecar.admin_url + "/metrics") as response:
        text = await response.text()
    assert "evenhand_sidecar_queued_requests" in text and 'evenhand_backend_info{backend="vllm"} 1.0' in text
    async with sidecar.session.get(sidecar.admin_url + "/v1/scheduler-config") as response:
        assert (await response.json())["backend"] == "vllm"


async def test_a_unix_socket_and_more_connections_than_aiohttp_allows_by_itself(tmp_path: Path, start: Start) -> None:
    release, num_open = asyncio.Event(), 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal num_open
        response = await open_stream(request)
        await response.write(event())
        num_open += 1
        await release.wait()
        await response.write(DONE)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "engine.sock")).start()
    sidecar = await start("http://localhost", socket=tmp_path / "engine.sock", connect_timeout=10.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        sidecar.session = session
        streams = [asyncio.create_task(sidecar.stream()) for _ in range(120)]
        async with asyncio.timeout(WAIT_SECONDS):
            while num_open < 120:
                await asyncio.sleep(0.02)
        release.set()
        assert {status for status, _ in await asyncio.gather(*streams)} == {200}
    await sidecar.settled()
    await runner.cleanup()


async def test_refusals_of_the_upstream_pass_and_cost_nothing(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too long"}}, status=400, headers={"X-Theirs": "1"})

    upstream.script = answer
    async with sidecar.post({"messages": [{"content": "x" * 4_000}]}) as response:
        assert (response.status, response.headers["X-Theirs"]) == (400, "1")
        assert json.loads(await response.read()) == {"error": {"message": "too long"}}
    await sidecar.settled()
    assert sidecar.tokens() == (0, 0)
