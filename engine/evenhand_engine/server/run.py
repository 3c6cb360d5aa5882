"""The life of the server: sockets, engine, applications; then signals, drain and the exit code."""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from aiohttp import web

from evenhand_engine.config import EngineConfig
from evenhand_engine.engine_client import CoreProcess, EngineClient, spawn_core
from evenhand_engine.errors import StartupError
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.policy_source import PolicySource, load_initial
from evenhand_engine.server.admin import build_admin_app
from evenhand_engine.server.app import build_app
from evenhand_engine.server.config_state import ConfigSource, ConfigState
from evenhand_engine.server.service import Service
from evenhand_engine.server.settings import ServerSettings
from evenhand_engine.tokenizer import Tokenizer
from evenhand_policy.config import SchedulerConfig

log = logging.getLogger(__name__)

_BACKLOG = 1024
_DEATH_GRACE_SECONDS = 1.0  # for the last events of the streams, once the engine is dead

_REPEAT_SECONDS = 1.0

SpawnCore = Callable[[EngineConfig], tuple[CoreProcess, Connection]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts requests."""

    service: Service
    url: str
    admin_url: str


@contextlib.asynccontextmanager
async def start_server(
    settings: ServerSettings, config: EngineConfig, *, spawn: SpawnCore = spawn_core
) -> AsyncIterator[Running]:
    """Bind, load, serve; on leaving, stop everything. Raises StartupError.

    Ports are bound first, so that one in use is found before a model is loaded. Clients that connect meanwhile wait.
    """
    async with contextlib.AsyncExitStack() as stack:
        tls = _tls_context(settings)
        public = stack.enter_context(_listen(settings.host, settings.port, "--port"))
        admin = stack.enter_context(_listen(settings.admin_host, settings.admin_port, "--admin-port"))
        config_state = await _in_daemon_thread(lambda: _initial_config(settings))
        directory = await _in_daemon_thread(lambda: resolve_model_dir(config.model))
        engine = EngineClient(*spawn(config))
        stack.push_async_callback(engine.close)
        tokenizer = await _in_daemon_thread(lambda: Tokenizer(directory))
        ready = await engine.start()
        service = Service(settings, engine, ready, tokenizer, config_state)
        stack.callback(service.close)
        await _serve_app(stack, build_admin_app(service), admin, None)
        await _serve_app(stack, build_app(service), public, tls)
        if settings.policies is not None:
            apply = functools.partial(service.apply_config, source=ConfigSource.FILES)
            source = PolicySource(settings.policies, apply, service.reject_config)
            await stack.enter_async_context(_background(source.run()))
        yield Running(service, _url("http" if tls is None else "https", public), _url("http", admin))


def _initial_config(settings: ServerSettings) -> ConfigState:
    if settings.policies is None:
        return ConfigState(SchedulerConfig(), ConfigSource.DEFAULT)
    return ConfigState(load_initial(settings.policies), ConfigSource.FILES)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _serve_app(
    stack: contextlib.AsyncExitStack, app: web.Application, listener: socket.socket, tls: ssl.SSLContext | None
) -> None:
    # A handler is cancelled when its client leaves, streaming or not: that aborts the request.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, keepalive_timeout=75, shutdown_timeout=1)
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    await web.SockSite(runner, listener, ssl_context=tls, backlog=_BACKLOG).start()


async def serve(
    settings: ServerSettings,
    config: EngineConfig,
    announce: Callable[[Running], None],
    *,
    spawn: SpawnCore = spawn_core,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain. Returns the exit code.

    A signal during start-up ends it. Raises StartupError. Must run in the main thread, as the main task.
    """
    stop = _StopSignals()
    try:
        async with start_server(settings, config, spawn=spawn) as running:
            stop.started()
            announce(running)
            return await _serve_until_stopped(running.service, stop)
    except asyncio.CancelledError:
        if not stop.requested.is_set():
            raise
        return 0


class _StopSignals:
    """SIGTERM and SIGINT: before the server has started they cancel the main task, after that they set events.

    `timeout` and some supervisors send a signal twice at once, which means no more than once.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.repeated = asyncio.Event()
        self._requested_at = 0.0
        self._starting = asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def started(self) -> None:
        self._starting = None

    def _receive(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self.requested.is_set():
            self._requested_at = now
            self.requested.set()
        elif now - self._requested_at > _REPEAT_SECONDS:
            self.repeated.set()
        if self._starting is not None:
            self._starting.cancel()


async def _serve_until_stopped(service: Service, stop: _StopSignals) -> int:
    engine = service.engine
    await _first_of(stop.requested.wait(), engine.died.wait())
    if not engine.died.is_set():
        service.draining = True
        log.info("draining", extra={"fields": {"timeout": service.settings.drain_timeout}})
        drained = service.active.wait_until_none()
        await _first_of(drained, stop.repeated.wait(), engine.died.wait(), timeout=service.settings.drain_timeout)
    if engine.died.is_set():
        log.error("the engine died", extra={"fields": {"reason": engine.failure}})
        await _first_of(service.active.wait_until_none(), timeout=_DEATH_GRACE_SECONDS)
        return 1
    await engine.close()  # whatever still runs ends with an error event that says why
    await _first_of(service.active.wait_until_none(), timeout=_DEATH_GRACE_SECONDS)
    return 0


async def _first_of(*waits: Coroutine[Any, Any, object], timeout: float | None = None) -> None:
    """Wait for whichever is first, and give up the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


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


def _listen(host: str, port: int, flag: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise StartupError(f"cannot listen on {host}, port {port}: {error.strerror}. Choose another {flag}") from error


def _tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    if settings.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except OSError as error:  # ssl.SSLError is one
        files = " and ".join(str(path) for path in (settings.ssl_certfile, settings.ssl_keyfile) if path)
        raise StartupError(f"cannot use the TLS certificate of {files}: {error}") from error
    return context


def _url(scheme: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
