"""HTTP of upstreams that is seldom seen and legal: answers without a body, before the answer, without a length, elsewhere."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, Sidecar, Start, event, open_stream, usage_event
from .test_bad_upstreams import raw_upstream


@pytest.mark.parametrize("status", [204, 205, 304])
@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream", "text/plain"])
async def test_an_answer_without_a_body_is_one(
    upstream: ScriptedUpstream, start: Start, status: int, content_type: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: {content_type}\r\nX-Theirs: 1\r\n"
        writer.write(
            head.encode() + (b"Content-Length: 0\r\n" if status == 205 else b"") + b"Connection: close\r\n\r\n"
        )
        await writer.drain()

    async with raw_upstream(answer) as url:
        sidecar = await start(url)
        async with asyncio.timeout(WAIT_SECONDS), sidecar.post({"stream": True}) as response:
            assert (response.status, await response.read(), response.headers["X-Theirs"]) == (status, b"", "1")
        await sidecar.settled()
        expected = (
            b'outcome="finished",reason="stop"' if status < 300 else b'outcome="failed",reason="upstream_refused"'
        )
        assert expected in sidecar.service.metrics.admin_text()


async def test_answers_before_the_answer_are_not_the_answer(start: Start) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        await writer.drain()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()

    async with raw_upstream(answer) as url:
        sidecar = await start(url)
        async with asyncio.timeout(WAIT_SECONDS), sidecar.post({}) as response:
            assert (response.status, await response.read(), "Link" in response.headers) == (200, b"{}", False)
        await sidecar.settled()


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "text/plain"])
async def test_an_upstream_of_http_1_0_ends_its_answer_with_the_connection(start: Start, kind: str) -> None:
    text = {"application/json": b'{"choices": []}', "text/event-stream": event() + DONE, "text/plain": b"x"}[kind]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: " + kind.encode() + b"\r\n\r\n" + text)
        await writer.drain()

    async with raw_upstream(answer) as url:
        sidecar = await start(url)
        for _ in range(2):
            async with asyncio.timeout(WAIT_SECONDS), sidecar.post({"stream": True}) as response:
                assert (response.status, await response.read()) == (200, text)
        await sidecar.settled()


async def test_a_connection_that_ends_as_a_request_is_sent_is_an_error_and_nothing_is_sent_twice(start: Start) -> None:
    """An idle one of the pool: nobody can know whether the upstream had read it."""
    num_posts = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_posts
        while not (head := await reader.readuntil(b"\r\n\r\n")).startswith(b"POST") or num_posts == 0:
            num_posts += head.startswith(b"POST")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
            await reader.read(2 if head.startswith(b"POST") else 0)
        num_posts += 1
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        sidecar = await start(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        statuses = []
        async with asyncio.timeout(WAIT_SECONDS):
            for _ in range(2):
                async with sidecar.post({}) as response:
                    statuses.append((response.status, (await response.json()).get("error", {}).get("code")))
        assert statuses == [(200, None), (502, "upstream_error")] and num_posts == 2
        await sidecar.settled()


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("{upstream}/v1/completions?a=1", "/v1/completions?a=1"),
        ("/elsewhere", "/elsewhere"),
        ("{upstream}0/x", "{upstream}0/x"),
        ("https://example.com/x", "https://example.com/x"),
    ],
)
async def test_a_redirect_costs_nothing_and_leads_to_this_server(
    upstream: ScriptedUpstream, sidecar: Sidecar, location: str, expected: str
) -> None:
    """As FastAPI answers a path with a slash at its end, with the host that it was asked for."""

    async def answer(request: web.Request) -> web.StreamResponse:
        page = "<h1>Temporary Redirect</h1>"
        headers = {"Location": location.format(upstream=upstream.url), "Content-Type": "text/html"}
        return web.Response(status=307, text=page, headers=headers)

    upstream.script = answer
    async with sidecar.post({"prompt": "x" * 400}, "/v1/completions/", allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (307, expected.format(upstream=upstream.url))
    await sidecar.settled()
    assert sidecar.tokens() == (0, 0)


async def test_a_stream_that_says_its_length_keeps_to_what_is_left_of_it(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    """An event is left out, so the length that the upstream says is not that of the answer."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=event() + usage_event(7, 1) + DONE, content_type="text/event-stream")

    upstream.script = answer
    assert await sidecar.stream() == (200, event() + DONE)
    await sidecar.settled()
    assert sidecar.tokens() == (7, 1)


@pytest.mark.parametrize("encoding", ["identity", "Identity", "gzip"])
async def test_an_encoding_that_is_none_is_read(upstream: ScriptedUpstream, sidecar: Sidecar, encoding: str) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Content-Encoding": encoding}
        return web.Response(body=event() + usage_event(7, 1) + DONE, headers=headers)

    upstream.script = answer
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.post(sidecar.url + "/v1/chat/completions", json={"stream": True}) as response,
    ):
        text = await response.read()
    is_read = encoding != "gzip"
    assert text == (event() + DONE if is_read else event() + usage_event(7, 1) + DONE)
    await sidecar.settled()
    assert (sidecar.tokens() == (7, 1)) == is_read


async def test_a_stream_to_get_is_no_generation(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(b"data: tick\n\n")
        return response

    upstream.script = answer
    async with sidecar.session.get(sidecar.url + "/events") as response:
        assert (response.status, await response.read()) == (200, b"data: tick\n\n")
