"""What comes is handed on in the call that brings it; clients that do not keep up, old ones, and the pool are minded."""

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from evenhand_engine.frontend.event_writer import EventWriter
from evenhand_engine.sidecar.relay import Relay

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, Sidecar, event, open_stream

MEGABYTE = 2**20


async def serve(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/"


async def test_a_relay_stops_where_no_more_is_taken_and_goes_on_later() -> None:
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event("1"))
        await go_on.wait()
        await response.write(event("2") + DONE)
        return response

    runner, url = await serve(answer)
    taken: list[bytes] = []

    def take(chunk: bytes) -> bool:
        taken.append(chunk)
        return False

    async with asyncio.timeout(WAIT_SECONDS), aiohttp.ClientSession() as session, session.get(url) as response:
        relay = Relay(response, take, WAIT_SECONDS)
        await relay.run()
        assert taken == [event("1")] and not relay.has_ended
        relay._heard_at -= 2 * WAIT_SECONDS  # whoever takes it was slow, and the upstream has said nothing meanwhile
        go_on.set()
        while not relay.has_ended:
            await relay.run()
        assert b"".join(taken) == event("1") + event("2") + DONE
    await runner.cleanup()


async def test_what_take_raises_is_raised_and_silence_is_a_timeout() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event())
        await asyncio.Event().wait()
        return response

    def fail(chunk: bytes) -> bool:
        raise ConnectionResetError

    runner, url = await serve(answer)
    for take, expected, patience in ((fail, ConnectionResetError, WAIT_SECONDS), (bool, TimeoutError, 0.1)):
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            try:
                await Relay(response, take, patience).run()
            except (ConnectionResetError, TimeoutError) as error:
                assert type(error) is expected
            else:
                raise AssertionError
            response.close()
    await runner.cleanup()


async def test_a_client_that_does_not_read_is_noticed_and_waited_for() -> None:
    stopped, num_sent = asyncio.Event(), 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal num_sent
        response = web.StreamResponse()
        await response.prepare(request)
        send = EventWriter(request, response)
        while send(b"x" * MEGABYTE):
            num_sent += 1
            assert num_sent < 500, "nobody said that the client does not keep up"
        num_sent += 1
        stopped.set()
        await send.drain()
        return response

    runner, url = await serve(answer)
    async with (
        asyncio.timeout(WAIT_SECONDS),
        aiohttp.ClientSession(read_bufsize=1024) as session,
        session.get(url) as response,
    ):
        await stopped.wait()
        assert len(await response.read()) == num_sent * MEGABYTE
    await runner.cleanup()


async def test_a_client_that_reads_late_gets_everything(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    large = event("x" * MEGABYTE)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        for _ in range(24):
            await response.write(large)
        await response.write(DONE)
        return response

    upstream.script = answer
    async with (
        asyncio.timeout(WAIT_SECONDS),
        aiohttp.ClientSession(read_bufsize=1024) as session,
        session.post(sidecar.url + "/v1/chat/completions", json={"stream": True}) as response,
    ):
        assert await response.content.readexactly(10) == large[:10]
        assert await response.read() == large[10:] + large * 23 + DONE
    await sidecar.settled()


async def raw(sidecar: Sidecar, request: bytes) -> bytes:
    url = urlsplit(sidecar.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(request)
    async with asyncio.timeout(WAIT_SECONDS):
        answer = await reader.read()  # until the connection is closed
    writer.close()
    return answer


async def test_clients_of_http_1_0_get_streams_without_chunks(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    """Such as nginx, by default."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request, "text/event-stream" if request.method == "POST" else "text/plain")
        for number in "123":
            await response.write(event(number))
            await asyncio.sleep(0.01)  # so that it is read alone
        await response.write(DONE)
        return response

    upstream.script = answer
    body = b'{"stream": true}'
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    for request in (b"POST /v1/chat/completions HTTP/1.0\r\n" + head + body, b"GET /other HTTP/1.0\r\n\r\n"):
        status, _, text = (await raw(sidecar, request)).partition(b"\r\n\r\n")
        assert b" 200 " in status.splitlines()[0] and b"chunked" not in status
        assert text == event("1") + event("2") + event("3") + DONE
    await sidecar.settled()


async def test_a_connection_that_was_relayed_is_used_again(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    peers = []

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.append(request.transport.get_extra_info("peername"))
        if request.headers.get("X-Whole"):
            return web.json_response({})
        response = await open_stream(request)
        await response.write(event())
        await response.write(DONE)
        return response

    upstream.script = answer
    for _ in range(2):
        assert await sidecar.stream() == (200, event() + DONE)
        async with sidecar.post({}, headers={"X-Whole": "1"}) as whole:
            assert await whole.json() == {}
    assert len(peers) == 4 and len(set(peers)) <= 2, "each answer took a connection of its own"  # a probe has another
    await sidecar.settled()


async def test_headers_do_not_wait_for_the_first_event(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await go_on.wait()
        await response.write(DONE)
        return response

    upstream.script = answer
    async with asyncio.timeout(WAIT_SECONDS), sidecar.post({"stream": True}) as response:
        assert response.status == 200
        go_on.set()
        assert await response.read() == DONE
    await sidecar.settled()
