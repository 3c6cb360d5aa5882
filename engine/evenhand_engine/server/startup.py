"""Start-up: bind, spawn the engine core, build the applications while it loads, serve; and all of it backwards.

The core needs seconds to import torch and load a model. So it is spawned as early as it can be, and what this process
needs for HTTP is imported meanwhile.
"""

import asyncio
import contextlib
import gc
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from evenhand_engine.backends.engine_client import CoreProcess, spawn_core
from evenhand_engine.backends.local import LocalBackend
from evenhand_engine.config import EngineConfig
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.server.listener import (
    BACKLOG,
    allow_many_connections,
    listen,
    tls_context,
    url_of,
    watch_certificate,
)

if TYPE_CHECKING:
    from aiohttp import web

    from evenhand_engine.backends.upstream import UpstreamSettings
    from evenhand_engine.frontend.config_in_force import ConfigInForce
    from evenhand_engine.frontend.push_receiver import PushReceiver
    from evenhand_engine.frontend.service import Service

SpawnCore = Callable[[EngineConfig], tuple[CoreProcess, Connection]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts requests."""

    service: "Service"
    url: str
    admin_url: str


@contextlib.asynccontextmanager
async def start_server(
    settings: ServerSettings, config: EngineConfig, *, spawn: SpawnCore = spawn_core
) -> AsyncIterator[Running]:
    """A server that accepts requests; on leaving, everything is stopped. Raises StartupError.

    Clients that connect while the model is being loaded wait.
    """
    async with contextlib.AsyncExitStack() as stack:
        allow_many_connections()
        tls = tls_context(settings)
        public = stack.enter_context(listen(settings.host, settings.port, "--port"))
        admin = stack.enter_context(listen(settings.admin_host, settings.admin_port, "--admin-port"))
        directory = await _in_daemon_thread(lambda: resolve_model_dir(config.model))
        load_model_config(directory)  # the core needs it, but what can be refused should not wait for torch
        backend = LocalBackend(*spawn(config))
        stack.push_async_callback(backend.close)

        from evenhand_engine.frontend.service import EngineService
        from evenhand_engine.server.admin import build_admin_app
        from evenhand_engine.server.app import build_app
        from evenhand_engine.server.malformed import keep_out_of_logs
        from evenhand_engine.text.tokenizer import Tokenizer

        in_force = await _in_daemon_thread(lambda: _initial_config(settings))
        tokenizer = backend.tokenizer = await _in_daemon_thread(lambda: Tokenizer(directory))
        await backend.start()
        service = EngineService(settings, backend, tokenizer, in_force)
        stack.callback(service.close)
        keep_out_of_logs()
        await _serve_app(stack, build_admin_app(service, _push_receiver(service)), admin, None)
        await _serve_app(stack, build_app(service), public, tls, decompress=False)  # `read_body` does
        await stack.enter_async_context(_watch_policies(service))
        if tls is not None:
            await stack.enter_async_context(_background(watch_certificate(settings, tls)))
        gc.collect()
        gc.freeze()  # what lives as long as the server need not be looked at again
        yield Running(service, url_of("http" if tls is None else "https", public), url_of("http", admin))


@contextlib.asynccontextmanager
async def start_sidecar(
    settings: ServerSettings,
    upstream_settings: "UpstreamSettings",
    *,
    priority: str = "off",
    salts_caches: bool = False,
    kv_tokens: int | None = None,
) -> AsyncIterator[Running]:
    """A sidecar that accepts requests, whether or not its upstream does yet; on leaving, everything is stopped.

    Raises StartupError.
    """
    from evenhand_engine.backends.upstream import Upstream
    from evenhand_engine.dispatch.dispatcher import Dispatcher, DispatchSettings
    from evenhand_engine.dispatch.window import Window
    from evenhand_engine.server.admin import build_admin_app
    from evenhand_engine.server.malformed import keep_out_of_logs
    from evenhand_engine.server.sidecar_app import build_sidecar_app
    from evenhand_engine.sidecar.service import SidecarService, UpstreamPriority

    async with contextlib.AsyncExitStack() as stack:
        allow_many_connections()
        tls = tls_context(settings)
        public = stack.enter_context(listen(settings.host, settings.port, "--port"))
        admin = stack.enter_context(listen(settings.admin_host, settings.admin_port, "--admin-port"))
        in_force = await _in_daemon_thread(lambda: _initial_config(settings))
        dispatcher = Dispatcher(
            Window(kv_tokens=kv_tokens),
            in_force.config,
            DispatchSettings(max_model_len=upstream_settings.max_model_len),
        )
        upstream = Upstream(upstream_settings, dispatcher)
        stack.push_async_callback(upstream.close)
        service = SidecarService(
            settings, upstream, in_force, priority=UpstreamPriority(priority), salts_caches=salts_caches
        )
        upstream.start()
        keep_out_of_logs()
        await _serve_app(stack, build_admin_app(service, _push_receiver(service)), admin, None)
        await _serve_app(stack, build_sidecar_app(service), public, tls, decompress=False)  # `read_body` does
        await stack.enter_async_context(_watch_policies(service))
        if tls is not None:
            await stack.enter_async_context(_background(watch_certificate(settings, tls)))
        gc.collect()
        gc.freeze()
        yield Running(service, url_of("http" if tls is None else "https", public), url_of("http", admin))


def _initial_config(settings: ServerSettings) -> "ConfigInForce":
    from evenhand_engine.frontend.config_in_force import ConfigInForce
    from evenhand_engine.frontend.config_store import ConfigDocument, LastGoodFile
    from evenhand_engine.frontend.policy_source import load_initial
    from evenhand_policy.config import SchedulerConfig
    from evenhand_policy.push_protocol import ConfigSource

    if settings.policies is not None:
        return ConfigInForce(ConfigDocument.unversioned(load_initial(settings.policies), ConfigSource.FILES))
    last_good = settings.push.last_good if settings.push else None
    built_in = ConfigDocument.unversioned(SchedulerConfig(), ConfigSource.BUILT_IN)
    return ConfigInForce(built_in, LastGoodFile(last_good) if last_good else None)


def _push_receiver(service: "Service") -> "PushReceiver | None":
    if service.settings.push is None:
        return None
    from evenhand_engine.frontend.push_receiver import PushReceiver

    return PushReceiver(service.settings.push, service.in_force, ailment=service.ailment)


async def _serve_app(
    stack: contextlib.AsyncExitStack,
    app: "web.Application",
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    *,
    decompress: bool = True,
) -> None:
    from aiohttp import web

    # A handler is cancelled when its client leaves, streaming or not: that aborts the request.
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=75,
        shutdown_timeout=1,
        auto_decompress=decompress,
    )
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    await web.SockSite(runner, listener, ssl_context=tls, backlog=BACKLOG).start()


@contextlib.asynccontextmanager
async def _watch_policies(service: "Service") -> AsyncIterator[None]:
    if service.settings.policies is None:
        yield
        return
    from evenhand_engine.frontend.policy_source import PolicySource

    source = PolicySource(service.settings.policies, service.in_force)
    async with _background(source.run()):
        yield


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread that an exit does not wait for, as it would for an executor's."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="start-up", daemon=True).start()
    return await future
