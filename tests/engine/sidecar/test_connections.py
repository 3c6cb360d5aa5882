"""What is between two connections: headers that stay on one, delays of small packets, bodies that stall, a status of its own."""

import asyncio
import gzip
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from aiohttp import web

from evenhand_engine.backends.upstream_metrics import read_gauges
from evenhand_engine.frontend import requests

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, Sidecar, Start, event, open_stream, say_three
from .test_bad_upstreams import raw_upstream


async def test_headers_of_one_connection_stay_on_it(start: Start) -> None:
    """As they are on the wire, both ways."""
    received = bytearray()
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close, X-Theirs\r\n"
    )
    answer += b"Keep-Alive: timeout=9\r\nX-Theirs: 1\r\nProxy-Authenticate: Basic\r\nX-Kept: 1\r\n\r\n{}"

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            received.extend(head)
        writer.write(answer)
        await writer.drain()
        writer.close()

    headers = {"Connection": "keep-alive, X-Mine", "X-Mine": "1", "TE": "trailers", "Proxy-Authorization": "Basic eA=="}
    async with await asyncio.start_server(answer_all, "127.0.0.1", 0) as server:
        sidecar = await start(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with sidecar.post({}, headers={**headers, "X-Kept": "1", "Trailer": "X-End"}) as response:
            assert response.status == 200
            assert not {"X-Theirs", "Keep-Alive", "Proxy-Authenticate"} & set(response.headers)
            assert response.headers["X-Kept"] == "1"
    names = {line.partition(b":")[0].lower() for line in bytes(received).split(b"\r\n")[1:]}
    assert not {b"x-mine", b"te", b"proxy-authorization", b"trailer", b"keep-alive"} & names
    assert b"x-kept" in names and b"x-request-id" in names


async def test_small_packets_are_not_delayed(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    """TCP_NODELAY on both connections, while an answer streams."""
    seen: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event())
        for transport in transports():
            connection = transport.get_extra_info("socket")
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await response.write(DONE)
        return response

    def transports() -> list[asyncio.Transport]:
        connector = sidecar.upstream.connection.session.connector
        assert connector is not None
        return [protocol.transport for protocol in connector._acquired if protocol.transport is not None]

    upstream.script = answer
    assert (await sidecar.stream())[0] == 200
    assert seen and all(seen)


async def test_a_body_that_stalls_keeps_no_place(
    upstream: ScriptedUpstream, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_BODY_TIMEOUT_SECONDS", 0.2)
    upstream.script = say_three
    stalls = asyncio.Event()

    async def trickle() -> AsyncIterator[bytes]:
        yield b"RIFF"
        await stalls.wait()

    headers = {"Content-Type": "audio/wav", "Content-Length": "1000"}
    async with (
        asyncio.timeout(WAIT_SECONDS),
        sidecar.session.post(sidecar.url + "/v1/audio/transcriptions", data=trickle(), headers=headers) as response,
    ):
        assert (response.status, (await response.json())["error"]["code"]) == (408, "request_timeout")
    stalls.set()
    await sidecar.settled()


@pytest.mark.parametrize("is_packed", [False, True])
async def test_who_waits_for_leave_to_send_gets_it_where_bodies_stream(
    upstream: ScriptedUpstream, sidecar: Sidecar, is_packed: bool
) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read(), content_type="audio/wav")

    upstream.script = echo
    data, headers = b"w" * 2**17, {"Content-Type": "audio/wav"} | ({"Content-Encoding": "gzip"} if is_packed else {})
    async with (
        asyncio.timeout(WAIT_SECONDS),
        sidecar.session.post(
            sidecar.url + "/v1/audio/speech",
            data=gzip.compress(data) if is_packed else data,
            headers=headers,
            expect100=True,
        ) as response,
    ):
        assert await response.read() == data
    await sidecar.settled()


async def test_a_connection_that_the_upstream_has_just_closed_is_used_no_more(start: Start) -> None:
    """It closes while the event loop is busy, so that nobody here could know but by looking."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    may_close, has_closed, num_answered = threading.Event(), threading.Event(), 0

    def serve(listener: socket.socket) -> None:
        nonlocal num_answered
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
                num_answered += 1
                if num_answered == 1:
                    assert may_close.wait(WAIT_SECONDS)
            has_closed.set()

    sidecar = await start("http://127.0.0.1:9")  # for its session alone
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as threads:
        listener.settimeout(WAIT_SECONDS)
        serving = threads.submit(serve, listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        for number in range(2):
            async with sidecar.upstream.connection.session.post(url, data=b"x") as response:
                assert await response.read() == b"{}"
            if number == 0:
                may_close.set()
                assert has_closed.wait(WAIT_SECONDS)  # and the event loop does not turn
        serving.result(WAIT_SECONDS)
    assert num_answered == 2


async def test_an_upstream_that_would_change_the_protocol_is_refused(start: Start) -> None:
    async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nanything")
        await writer.drain()

    async with raw_upstream(switch) as url:
        sidecar = await start(url)
        for _ in range(2):
            async with asyncio.timeout(WAIT_SECONDS), sidecar.post({}) as response:
                assert response.status == 502
        await sidecar.settled()


@pytest.mark.parametrize(
    ("text", "size", "num_waiting"),
    [
        ('vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\nvllm:num_requests_waiting{x="1"} 3\n', 1_600, 3),
        ("sglang:max_total_num_tokens 5000.0\nsglang:num_queue_reqs 2.0\n", 5_000, 2),
        ("llamacpp:requests_deferred 4\nllamacpp:n_tokens_max 77\n", None, 4),
        ('vllm:cache_config_info{block_size="x"} 1.0\nvllm:num_requests_waiting NaN?\n', None, None),
        ("vllm:num_requests_waiting +Inf\nsglang:max_total_num_tokens NaN\nllamacpp:requests_deferred -1\n", None, None),
    ],
)  # fmt: skip
def test_each_engine_says_its_size_in_its_own_words(text: str, size: int | None, num_waiting: int | None) -> None:
    gauges, kv_tokens = read_gauges(text)
    assert (kv_tokens, gauges.num_waiting) == (size, num_waiting)
