"""More ways in which an upstream fails, one by one: refusing, restarting midway, slow, packed streams, endless events."""

import asyncio
import gzip
import json

import pytest
from aiohttp import web

from evenhand_policy.config import Limits, SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash

from .conftest import DONE, ScriptedUpstream, Sidecar, Start, event, open_stream, usage_event
from .test_bad_upstreams import code_of, raw_upstream

KEY = "a-key-of-the-team-0123456789"


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 500, 503])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_what_it_refuses_passes_with_its_headers_and_gives_the_quota_back(
    upstream: ScriptedUpstream, sidecar: Sidecar, status: int, is_stream: bool
) -> None:
    error = {"error": {"message": "no", "type": "theirs", "code": status}}

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(error, status=status, headers={"Retry-After": "7", "X-Theirs": "1"})

    upstream.script = answer
    team = TenantConfig(tenant_id="team", key_hashes=(key_hash(KEY),), limits=Limits(tokens_per_minute=1000))
    sidecar.apply(SchedulerConfig(tenants=(team,)))
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"messages": [{"role": "user", "content": "x" * 800}], "stream": is_stream, "max_tokens": 300}
    for _ in range(4):  # more than the quota holds, if any were kept
        async with sidecar.post(body, headers=headers) as response:
            assert (response.status, response.headers["Retry-After"], response.headers["X-Theirs"]) == (
                status,
                "7",
                "1",
            )
            assert await response.json() == error
        await sidecar.until(lambda: sidecar.service.admission.account("team").num_in_flight == 0)
    await sidecar.settled()
    assert sidecar.tokens("team") == (0, 0)


async def test_one_that_restarts_midway_ends_what_it_had_and_serves_what_comes(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    """Nothing that was sent is sent again: it may have been computed."""

    async def break_off(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event() * 2)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def serve(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event() + usage_event(9, 1) + DONE)
        return response

    upstream.script = break_off
    texts = [text for _, text in await asyncio.gather(*(sidecar.stream() for _ in range(2)))]
    assert [code_of(text) for text in texts] == ["upstream_error"] * 2 and all(DONE not in text for text in texts)
    assert len(upstream.received) == 2
    upstream.script = serve
    assert await sidecar.stream() == (200, event() + DONE)
    await sidecar.settled()
    assert sidecar.tokens()[1] == 5


async def test_a_slow_one_is_waited_for_as_long_as_it_says_something(upstream: ScriptedUpstream, start: Start) -> None:
    """Comments count, such as llama.cpp sends while a request waits for a slot, and as events they count for nothing."""
    sidecar = await start(upstream.url, idle_timeout=2.0)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        for _ in range(5):
            await response.write(b":\n\n")
            await asyncio.sleep(0.5)
        await response.write(event() + DONE)
        return response

    upstream.script = answer
    assert await sidecar.stream() == (200, b":\n\n" * 5 + event() + DONE)
    await sidecar.settled()
    assert sidecar.tokens()[1] == 1


async def test_a_packed_stream_nobody_asked_for_passes_as_it_is(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    packed = gzip.compress(event() * 3 + DONE)

    async def answer(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(packed)
        return response

    upstream.script = answer
    assert await sidecar.stream() == (200, event() * 3 + DONE)  # the client unpacks it
    await sidecar.settled()
    assert sidecar.tokens()[1] == len(packed) // 4


@pytest.mark.parametrize("usage", [b"", b',"usage":{"prompt_tokens":1,"completion_tokens":-9}'])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
async def test_an_answer_without_a_usage_to_believe_is_charged_by_its_bytes_where_it_was_generated(
    upstream: ScriptedUpstream, sidecar: Sidecar, path: str, usage: bytes
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=b'{"choices":[{"message":{"content":"' + b"x" * (400 - len(usage)) + b'"}}]' + usage + b"}",
            content_type="application/json",
        )

    upstream.script = answer
    for max_tokens, expected in ((1000, 110), (50, 50)):
        before = sidecar.tokens()[1] if upstream.received else 0
        async with sidecar.post({"messages": [], "max_tokens": max_tokens}, path) as response:
            assert response.status == 200
            await response.read()
        await sidecar.settled()
        assert sidecar.tokens()[1] - before == (expected if "chat" in path else 0)


@pytest.mark.parametrize("space", [b"", b" "])
async def test_an_error_of_its_own_ends_a_stream_once(
    upstream: ScriptedUpstream, sidecar: Sidecar, space: bytes
) -> None:
    """vLLM and llama.cpp send one as an event, and no end after it."""
    theirs = b'data: {"error":' + space + b'{"message": "out of memory", "code": 500}}\n\n'

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event())
        await response.write(theirs)
        return response

    upstream.script = answer
    assert await sidecar.stream() == (200, event() + theirs)
    await sidecar.settled()
    assert sidecar.tokens()[1] == 1


async def test_an_event_that_never_ends_is_held_by_nobody(start: Start) -> None:
    total = 32 * 2**20

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: ")
        for _ in range(total // 2**16):
            writer.write(b"x" * 2**16)
            await writer.drain()

    async with raw_upstream(answer) as url:
        sidecar = await start(url)
        num_bytes = 0
        async with sidecar.post({"stream": True}) as response:
            async for chunk in response.content.iter_any():
                num_bytes += len(chunk)
                last = chunk
        assert num_bytes > total and code_of(last) == "upstream_error"
        await sidecar.settled()


@pytest.mark.parametrize("num_cached", [6, 10**6])
async def test_more_cached_than_there_were_is_not_believed(
    upstream: ScriptedUpstream, sidecar: Sidecar, num_cached: int
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": num_cached}}
        return web.json_response({"choices": [], "usage": usage})

    upstream.script = answer
    async with sidecar.post({"messages": [{"content": "x" * 400}], "max_tokens": 8}) as response:
        assert json.loads(await response.read())["usage"]["completion_tokens"] == 2
    await sidecar.settled()
    num_prompt_tokens, _ = sidecar.tokens()
    assert num_prompt_tokens > 50, "a prompt was taken off the bill"
