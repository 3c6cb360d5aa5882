"""Shared by the sidecar's tests: a scripted upstream on loopback, and a sidecar before it, in the test's own loop."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from evenhand_engine.backends.upstream import Upstream
from evenhand_engine.backends.upstream_connection import UpstreamSettings
from evenhand_engine.frontend.config_store import ConfigDocument
from evenhand_engine.frontend.push_receiver import PushSettings
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.sidecar_startup import start_sidecar
from evenhand_engine.server.startup import Running
from evenhand_engine.sidecar.counting import PromptCounter
from evenhand_engine.sidecar.service import SidecarService
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.push_protocol import ConfigSource

WAIT_SECONDS = 120.0
TEAM_KEY = "a-key-of-the-team-0123456789"
Script = Callable[[web.Request], Awaitable[web.StreamResponse]]


def event(text: str = "x") -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


def usage_event(prompt: int, output: int, cached: int = 0) -> bytes:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def open_stream(request: web.Request, content_type: str = "text/event-stream") -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    return response


@dataclass
class ScriptedUpstream:
    """An aiohttp server whose every generating answer is a script.

    Attributes:
        script: answers a request; the tests set it.
        received: (path, headers, body) of each request but probes, in order.
        metrics, props, server: what it says of itself; no props: it knows no such path.
        num_open, num_cancelled: answers in progress, and those that the sidecar ended.
    """

    script: Script | None = None
    received: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)
    metrics: str = ""
    props: dict[str, Any] | None = None
    server: str = "scripted"
    num_open: int = 0
    num_cancelled: int = 0
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/health":
            return web.Response(headers={"Server": self.server})
        if request.path == "/props":
            return web.Response(status=404) if self.props is None else web.json_response(self.props)
        if request.path == "/metrics":
            return web.Response(text=self.metrics)
        self.received.append((request.raw_path, request.headers, await request.read()))
        if request.path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})
        assert self.script is not None
        self.num_open += 1
        try:
            return await self.script(request)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1

    def body(self, index: int = -1) -> Any:
        return json.loads(self.received[index][2])


@dataclass
class Sidecar:
    url: str
    admin_url: str
    running: Running
    session: aiohttp.ClientSession

    @property
    def service(self) -> SidecarService:
        assert isinstance(self.running.service, SidecarService)
        return self.running.service

    @property
    def prompts(self) -> PromptCounter:
        """Of the process at the public port, if that is this one."""
        assert self.running.front is not None
        return self.running.front.prompts

    @property
    def upstream(self) -> Upstream:
        return self.service.upstream

    def apply(self, config: SchedulerConfig) -> None:
        self.service.in_force.replace(ConfigDocument.unversioned(config, ConfigSource.FILES))

    def post(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> Any:
        return self.session.post(self.url + path, json=body, **options)

    async def stream(self, **fields: Any) -> tuple[int, bytes]:
        """Status and text of a chat stream."""
        async with self.post({"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}) as response:
            return response.status, await response.read()

    async def settled(self) -> None:
        """Wait until nothing is in flight, and check that nothing was leaked."""
        dispatcher = self.upstream.dispatcher
        async with asyncio.timeout(WAIT_SECONDS):
            while dispatcher.request_table.requests or self.service.admission.account("default").num_in_flight:
                await asyncio.sleep(0.01)
        window = dispatcher.window
        assert (window.num_tokens, window.num_unstarted_tokens, window.num_in_flight) == (0, 0, 0)
        dispatcher.request_table.check_integrity()
        assert not self.upstream._waiting

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                await asyncio.sleep(0.01)

    def tokens(self, tenant_id: str = "default") -> tuple[int, int]:
        """Prompt and output tokens that the tenant was charged."""
        tenant = self.upstream.dispatcher.request_table.tenants[tenant_id]
        return tenant.num_prompt_tokens, tenant.num_generation_tokens


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    scripted = ScriptedUpstream()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", scripted.handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield scripted
    await runner.cleanup()


Start = Callable[..., Awaitable[Sidecar]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts sidecars: `await start(url, connect_timeout=..., idle_timeout=..., push=..., salts_caches=...)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def begin(
            url: str,
            *,
            connect_timeout: float = WAIT_SECONDS,
            idle_timeout: float = WAIT_SECONDS,
            socket: Any = None,
            kv_tokens: int | None = None,
            max_num_seqs: int | None = None,
            api_server_count: int = 1,
            push: PushSettings | None = None,
            **options: Any,
        ) -> Sidecar:
            settings = ServerSettings(
                host="127.0.0.1",
                port=0,
                admin_port=0,
                max_request_bytes=2**25,
                api_server_count=api_server_count,
                push=push,
            )
            reached = UpstreamSettings(
                url=url,
                connect_timeout=connect_timeout,
                idle_timeout=idle_timeout,
                socket=socket,
                kv_tokens=kv_tokens,
                max_num_seqs=max_num_seqs,
            )
            running = await stack.enter_async_context(start_sidecar(settings, reached, **options))
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            return Sidecar(running.url, running.admin_url, running, session)

        yield begin


@pytest.fixture
async def sidecar(upstream: ScriptedUpstream, start: Start) -> Sidecar:
    return await start(upstream.url)


async def say_three(request: web.Request) -> web.StreamResponse:
    response = await open_stream(request)
    for _ in range(3):
        await response.write(event())
    await response.write(usage_event(prompt=11, output=3, cached=4))
    await response.write(DONE)
    return response
