"""Every way in which an upstream fails: the client learns the truth, nothing leaks, and charges are settled."""

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from cluster.ports import free_ports

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, Sidecar, Start, event, open_stream, usage_event


def code_of(answer: bytes) -> str:
    """The reason in a JSON error, or in the last event of a stream."""
    return str(json.loads(answer.strip().rpartition(b"data: ")[2])["error"]["code"])


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw_upstream(answer: Answer) -> AsyncIterator[str]:
    """A server that speaks whatever it likes to whoever posts, and is well otherwise; yields its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                await answer(reader, writer)
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_one_that_is_down_is_said_to_be(start: Start) -> None:
    [port] = free_ports(1)
    sidecar = await start(f"http://127.0.0.1:{port}", connect_timeout=0.3)
    for stream in (True, False):
        async with sidecar.post({"stream": stream}) as response:
            assert (response.status, code_of(await response.read())) == (503, "upstream_unavailable")
            assert int(response.headers["Retry-After"]) >= 1
    async with sidecar.session.get(sidecar.url + "/ready") as response:
        assert response.status == 503
    await sidecar.settled()
    assert sidecar.tokens() == (0, 0)


@pytest.mark.parametrize("size", [1, 300_000])
async def test_one_that_restarts_is_waited_for_where_nothing_was_sent(start: Start, size: int) -> None:
    """Also by a body that goes in pieces."""
    [port] = free_ports(1)
    sidecar = await start(f"http://127.0.0.1:{port}", connect_timeout=WAIT_SECONDS)
    asking = asyncio.create_task(sidecar.stream(junk="x" * size))
    await asyncio.sleep(0.3)
    scripted = ScriptedUpstream(script=_done)
    app = web.Application(client_max_size=2**20)
    app.router.add_route("*", "/{path:.*}", scripted.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    assert await asking == (200, event() + DONE)
    assert len(scripted.body()["junk"]) == size
    await runner.cleanup()
    await sidecar.settled()


async def _done(request: web.Request) -> web.StreamResponse:
    response = await open_stream(request)
    await response.write(event() + DONE)
    return response


async def test_one_that_says_nothing_times_out_before_and_inside_its_answer(
    upstream: ScriptedUpstream, start: Start
) -> None:
    sidecar = await start(upstream.url, idle_timeout=1.0)

    async def hang(request: web.Request) -> web.StreamResponse:
        if request.headers.get("X-Begin"):
            response = await open_stream(request)
            await response.write(event())
        await asyncio.Event().wait()
        raise AssertionError

    upstream.script = hang
    async with sidecar.post({"stream": True}) as response:
        assert (response.status, code_of(await response.read())) == (504, "upstream_timeout")
    async with sidecar.post({"stream": True}, headers={"X-Begin": "1"}) as response:
        text = await response.read()
    assert (response.status, code_of(text)) == (200, "upstream_timeout")
    assert text.startswith(event()) and DONE not in text
    await sidecar.settled()
    assert sidecar.tokens()[1] == 1


@pytest.mark.parametrize("is_stream", [True, False])
async def test_one_that_closes_midway_is_no_answer(start: Start, is_stream: bool) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = b"text/event-stream" if is_stream else b"application/json"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\nContent-Length: 5000\r\n\r\n")
        writer.write(event() * 2 if is_stream else b'{"choices": [')
        await writer.drain()

    async with raw_upstream(answer) as url:
        sidecar = await start(url)
        async with sidecar.post({"stream": is_stream}) as response:
            text = await response.read()
        assert (response.status, code_of(text)) == (200 if is_stream else 502, "upstream_error")
        await sidecar.settled()
        assert sidecar.tokens()[1] == (2 if is_stream else 0)


async def test_a_stream_without_its_end_is_not_taken_for_complete(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event())
        return response

    upstream.script = answer
    status, text = await sidecar.stream()
    assert (status, code_of(text)) == (200, "upstream_error")
    await sidecar.settled()


GARBAGE = {
    "no HTTP": b"\x16\x03\x01 what?\r\n\r\n",
    "nothing": b"",
    "endless header": b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(100_000)) + b"\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
    "bad chunks": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_is_an_error_of_the_upstream(start: Start, name: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GARBAGE[name])
        await writer.drain()

    async with raw_upstream(answer) as url:
        sidecar = await start(url)
        async with asyncio.timeout(WAIT_SECONDS), sidecar.post({"stream": True}) as response:
            assert (response.status, code_of(await response.read())) == (502, "upstream_error")
        await sidecar.settled()


@pytest.mark.parametrize(("status", "expected"), [(200, 502), (502, 502), (503, 503)])
async def test_a_page_in_html_is_no_answer(
    upstream: ScriptedUpstream, sidecar: Sidecar, status: int, expected: int
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="<h1>nginx</h1>", content_type="text/html")

    upstream.script = answer
    async with sidecar.post({"stream": True}) as response:
        assert (response.status, code_of(await response.read())) == (expected, "upstream_error")
    await sidecar.settled()


async def test_json_that_is_none_is_no_answer(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b'{"choices": [}', content_type="application/json")

    upstream.script = answer
    async with sidecar.post({}) as response:
        assert (response.status, code_of(await response.read())) == (502, "upstream_error")
    await sidecar.settled()


async def test_a_compressed_answer_nobody_asked_for_passes_as_it_is(
    upstream: ScriptedUpstream, sidecar: Sidecar
) -> None:
    packed = gzip.compress(b'{"choices": []}')

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(body=packed, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"})

    upstream.script = answer
    async with sidecar.post({}) as response:
        assert await response.json() == {"choices": []}  # the client unpacks it
    await sidecar.settled()


@pytest.mark.parametrize(
    "usage",
    [
        b'data: {"choices":[],"usage":{"prompt_tokens":-5,"completion_tokens":3}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":99999999999,"completion_tokens":3}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1e30}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":"many"}}\n\n',
        b'data: {"choices":[],"usage":{]}\n\n',
        b"",
    ],
    ids=["negative", "huge", "float", "text", "broken", "none"],
)
async def test_usage_that_cannot_be_is_not_believed(upstream: ScriptedUpstream, sidecar: Sidecar, usage: bytes) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event() * 4 + usage + DONE)
        return response

    upstream.script = answer
    assert (await sidecar.stream())[0] == 200
    await sidecar.settled()
    num_prompt_tokens, num_output_tokens = sidecar.tokens()
    assert 1 <= num_prompt_tokens < 100 and num_output_tokens == 4  # by its bytes, and by events


async def test_an_event_of_10_megabytes_passes_in_pieces(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    large = event("x" * 10 * 2**20)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(large)
        await response.write(event() + usage_event(5, 9) + DONE)
        return response

    upstream.script = answer
    assert await sidecar.stream() == (200, large + event() + DONE)
    await sidecar.settled()
    assert sidecar.tokens() == (5, 9)
