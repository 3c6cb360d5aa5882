"""Two hundred streams while something breaks: every request ends as it should, charges are settled, and nothing is left over."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web

from cluster.ports import free_ports
from evenhand_engine.backends.upstream_connection import UpstreamSettings
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.run import run_until_stopped
from evenhand_engine.server.sidecar_startup import start_sidecar
from evenhand_engine.server.startup import Running
from evenhand_policy.config import SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash

from .conftest import DONE, TEAM_KEY, WAIT_SECONDS, ScriptedUpstream, Sidecar, Start, event, open_stream
from .test_bad_upstreams import code_of

NUM_STREAMS = 200
TEAM = {"Authorization": f"Bearer {TEAM_KEY}"}


@contextlib.asynccontextmanager
async def listening(scripted: ScriptedUpstream, port: int = 0) -> AsyncIterator[str]:
    """The scripted upstream at that port, for a while: its end is that of its process, with all connections reset."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", scripted.handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        server = runner.server
        assert server is not None
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()


class Leftovers:
    """What one sidecar in this process leaves over: tasks, connections to the upstream, descriptors."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar
        self._tasks = len(asyncio.all_tasks())
        self._files = len(os.listdir("/proc/self/fd"))

    async def none(self) -> None:
        sidecar = self._sidecar
        await sidecar.settled()
        for session in (sidecar.session, sidecar.upstream.connection.session):
            assert session.connector is not None
            await sidecar.until(lambda session=session: not session.connector._acquired)
            await session.connector.close()  # what is idle is kept for a while
        await sidecar.until(lambda: len(asyncio.all_tasks()) <= self._tasks)
        await sidecar.until(lambda: len(os.listdir("/proc/self/fd")) <= self._files)


async def one_event_then_nothing(request: web.Request) -> web.StreamResponse:
    response = await open_stream(request)
    await response.write(event())
    await asyncio.Event().wait()
    raise AssertionError


async def one_event(request: web.Request) -> web.StreamResponse:
    response = await open_stream(request)
    await response.write(event() + DONE)
    return response


async def test_an_upstream_is_killed_amid_its_streams_and_comes_back(start: Start) -> None:
    """Who had a token is told that it ends; who had none and had been sent, too; who waits here is served by the next process."""
    [port] = free_ports(1)
    scripted = ScriptedUpstream(script=one_event_then_nothing)
    async with contextlib.AsyncExitStack() as first:
        await first.enter_async_context(listening(scripted, port))
        sidecar = await start(f"http://127.0.0.1:{port}", max_num_seqs=NUM_STREAMS)
        leftovers = Leftovers(sidecar)
        streams = [asyncio.create_task(sidecar.stream()) for _ in range(NUM_STREAMS)]
        await sidecar.until(lambda: scripted.num_open == NUM_STREAMS)
        waiting = [asyncio.create_task(sidecar.stream()) for _ in range(50)]
        await sidecar.until(lambda: sidecar.upstream.dispatcher.request_table.num_waiting == 50)
        await sidecar.until(lambda: sidecar.tokens()[1] == NUM_STREAMS)
    scripted.script = one_event
    ended = await asyncio.gather(*streams)
    assert {(status, code_of(text)) for status, text in ended} == {(200, "upstream_error")}
    assert all(text.startswith(event()) and DONE not in text for _, text in ended)
    async with listening(scripted, port):
        served = await asyncio.gather(*waiting)
        assert set(served) == {(200, event() + DONE)}
        assert sidecar.tokens()[1] == NUM_STREAMS + 50
        await leftovers.none()


async def test_each_tenth_connection_is_reset_each_tenth_answer_never_comes_and_policies_change(
    start: Start,
) -> None:
    """By the number that each request has; each seventh client leaves. A tenant is suspended while its requests wait and run."""
    gate = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        number = int((await request.json())["user"])
        assert request.transport is not None
        if number % 10 == 1:
            request.transport.abort()
            return web.Response()
        if number % 10 == 2:
            await asyncio.Event().wait()
        response = await open_stream(request)
        await response.write(event())
        await gate.wait()
        await response.write(event() + DONE)
        return response

    scripted = ScriptedUpstream(script=answer)
    teams = [
        TenantConfig(tenant_id="team", key_hashes=(key_hash(TEAM_KEY),), suspended=suspended)
        for suspended in (False, True)
    ]
    async with listening(scripted) as url:
        sidecar = await start(url, idle_timeout=8.0, max_num_seqs=NUM_STREAMS - 20)
        sidecar.apply(SchedulerConfig(tenants=(teams[0],)))
        leftovers = Leftovers(sidecar)

        async def ask(number: int) -> str:
            body = {"messages": [], "stream": True, "user": str(number)}
            async with sidecar.post(body, headers=TEAM if number % 2 else {}) as response:
                if response.status != 200:
                    return code_of(await response.read())
                text = await response.content.readany()
                if number % 7 == 0:
                    return "left"
                text += await response.read()
            return "complete" if text.endswith(DONE) else code_of(text)

        asking = [asyncio.create_task(ask(number)) for number in range(NUM_STREAMS)]
        await sidecar.until(lambda: len(scripted.received) >= NUM_STREAMS - 20)
        sidecar.apply(SchedulerConfig(tenants=(teams[1],)))
        gate.set()
        async with asyncio.timeout(WAIT_SECONDS):
            outcomes = await asyncio.gather(*asking)
        for number, outcome in enumerate(outcomes):
            expected = {1: "upstream_error", 2: "upstream_timeout"}.get(
                number % 10, "left" if number % 7 == 0 else "complete"
            )
            assert outcome == expected or (outcome == "tenant_suspended" and number % 2), (number, outcome)
        assert Counter(outcomes)["tenant_suspended"] <= 20
        await leftovers.none()
        assert sidecar.service.admission.account("team").num_in_flight == 0


async def test_a_signal_amid_streams_lets_them_end_and_refuses_what_is_new(upstream: ScriptedUpstream) -> None:
    settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0, drain_timeout=WAIT_SECONDS)
    started: list[Running] = []
    gate = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(event())
        await gate.wait()
        await response.write(event() + DONE)
        return response

    @contextlib.asynccontextmanager
    async def server() -> AsyncIterator[Running]:
        async with start_sidecar(settings, UpstreamSettings(url=upstream.url)) as running:
            yield running

    async def ask(session: aiohttp.ClientSession) -> tuple[int, bytes]:
        async with session.post(started[0].url + "/v1/chat/completions", json={"stream": True}) as response:
            return response.status, await response.read()

    upstream.script = answer
    running = asyncio.create_task(run_until_stopped(server(), started.append))
    async with asyncio.timeout(WAIT_SECONDS), aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        while not started:
            await asyncio.sleep(0.01)
        streams = [asyncio.create_task(ask(session)) for _ in range(NUM_STREAMS)]
        while upstream.num_open < NUM_STREAMS:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        while not started[0].service.draining:
            await asyncio.sleep(0.01)
        assert not running.done()
        gate.set()
        assert set(await asyncio.gather(*streams)) == {(200, event() * 2 + DONE)}
        assert await running == 0
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_sidecar_is_killed_amid_its_streams_and_comes_back(tmp_path: Path) -> None:
    """Its clients see their connections end, the upstream that nobody waits any more, and the next process knows nothing of either."""
    port, admin_port = free_ports(2)
    scripted = ScriptedUpstream(script=one_event_then_nothing)
    command = [str(Path(sys.executable).with_name("evenhand")), "sidecar", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--admin-port", str(admin_port), "--log-level", "warning", "--upstream"]

    async def ask(session: aiohttp.ClientSession) -> str:
        try:
            async with session.post(f"http://127.0.0.1:{port}/v1/completions", json={"stream": True}) as response:
                return f"{response.status} {(await response.read()).count(event())}"
        except aiohttp.ClientError as error:
            return type(error).__name__

    async def ready(session: aiohttp.ClientSession) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://127.0.0.1:{port}/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.05)

    async with (
        asyncio.timeout(WAIT_SECONDS),
        listening(scripted) as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        running(*command, url) as process,
    ):
        await ready(session)
        streams = [asyncio.create_task(ask(session)) for _ in range(NUM_STREAMS)]
        while scripted.num_open < NUM_STREAMS:
            await asyncio.sleep(0.01)
        process.kill()
        assert {outcome.split()[0] for outcome in await asyncio.gather(*streams)} <= {
            "ClientPayloadError",
            "ServerDisconnectedError",
            "ClientOSError",
        }
        while scripted.num_open:
            await asyncio.sleep(0.01)
        assert scripted.num_cancelled == NUM_STREAMS
        scripted.script = one_event
        async with running(*command, url):
            await ready(session)
            assert await ask(session) == "200 1"


@contextlib.asynccontextmanager
async def running(*command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
