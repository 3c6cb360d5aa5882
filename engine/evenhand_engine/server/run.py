"""The life of the server after its start: signals, drain, the engine's death, the exit code."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

from evenhand_engine.backends.engine_client import spawn_core
from evenhand_engine.config import EngineConfig
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.startup import Running, SpawnCore, start_server
from evenhand_engine.server.tasks import GRACE_SECONDS, first_of

log = logging.getLogger(__name__)

_REPEAT_SECONDS = 1.0  # a signal that comes again so soon is the same one


async def serve(
    settings: ServerSettings,
    config: EngineConfig,
    announce: Callable[[Running], None],
    *,
    spawn: SpawnCore = spawn_core,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain. SIGUSR1 drains alone. Returns the exit code.

    A signal during start-up ends it. Raises StartupError. Must run in the main thread, as the main task.
    """
    return await run_until_stopped(start_server(settings, config, spawn=spawn), announce)


async def run_until_stopped(
    server: contextlib.AbstractAsyncContextManager[Running], announce: Callable[[Running], None]
) -> int:
    """`serve`, for any server that is not started yet."""
    stop = _StopSignals()
    try:
        async with server as running:
            stop.started()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _begin_draining, running)
            announce(running)
            return await _serve_until_stopped(running, stop)
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


def _begin_draining(running: Running) -> None:
    """On SIGUSR1: refuse what is new and stay, for a server that ends when something else has ended."""
    running.drain()
    log.info("draining until SIGTERM")


async def _serve_until_stopped(running: Running, stop: _StopSignals) -> int:
    await first_of(stop.requested.wait(), running.wait_until_failed())
    if running.failure is None:
        running.drain()
        timeout = running.service.settings.drain_timeout
        log.info("draining", extra={"fields": {"timeout": timeout}})
        waits = (running.wait_until_idle(), stop.repeated.wait(), running.wait_until_failed())
        await first_of(*waits, timeout=timeout)
    if running.failure is not None:
        log.error("the engine died", extra={"fields": {"reason": running.failure}})
        await first_of(running.wait_until_idle(), timeout=GRACE_SECONDS)
        return 1
    await running.cut()
    await first_of(running.wait_until_idle(), timeout=GRACE_SECONDS)
    return 0
