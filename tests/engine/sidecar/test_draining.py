"""The order in which a Pod ends: the sidecar drains while the engine waits for it, the engine ends, then the sidecar."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

from aiohttp import web

from evenhand_engine.backends.upstream_connection import UpstreamSettings
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.run import run_until_stopped
from evenhand_engine.server.sidecar_startup import start_sidecar
from evenhand_engine.server.startup import Running

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, Sidecar, event, open_stream


async def test_the_engine_waits_until_what_runs_has_ended(upstream: ScriptedUpstream, sidecar: Sidecar) -> None:
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await go_on.wait()
        await response.write(event() + DONE)
        return response

    async def wait_for_the_drain() -> int:
        async with sidecar.session.get(sidecar.admin_url + "/drained") as response:
            return response.status

    upstream.script = answer
    stream = asyncio.create_task(sidecar.stream())
    await sidecar.until(lambda: upstream.num_open == 1)
    hook = asyncio.create_task(wait_for_the_drain())
    sidecar.service.draining = True
    async with sidecar.session.get(sidecar.url + "/ready") as response:
        assert response.status == 503
    async with sidecar.post({"stream": True}) as refused:  # what is new goes elsewhere
        assert (refused.status, refused.headers["Connection"]) == (503, "close")
    assert not hook.done() and not stream.done()
    go_on.set()
    async with asyncio.timeout(WAIT_SECONDS):
        assert await stream == (200, event() + DONE)
        assert await hook == 200


async def test_an_engine_that_ends_alone_does_not_wait_for_ever(upstream: ScriptedUpstream) -> None:
    settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0, drain_notice=0.01)
    async with start_sidecar(settings, UpstreamSettings(url=upstream.url)) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.admin_url.rpartition(":")[2]))
        writer.write(b"GET /drained HTTP/1.0\r\n\r\n")
        async with asyncio.timeout(WAIT_SECONDS):
            assert b" 200 " in await reader.readline()
        writer.close()
        assert not running.service.draining, "whoever reaches the port could stop it"


async def test_a_signal_drains_and_another_ends(upstream: ScriptedUpstream) -> None:
    settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0)
    started: list[Running] = []

    @contextlib.asynccontextmanager
    async def server() -> AsyncIterator[Running]:
        async with start_sidecar(settings, UpstreamSettings(url=upstream.url)) as running:
            yield running

    running = asyncio.create_task(run_until_stopped(server(), started.append))
    async with asyncio.timeout(WAIT_SECONDS):
        while not started:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)
        while not started[0].service.draining:
            await asyncio.sleep(0.01)
        assert not running.done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)
