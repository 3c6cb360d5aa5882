"""One API server: a process that serves the public port for an owner, which is another process.

It reads bodies, authenticates, tokenizes, detokenizes and streams, with a pipe of its own to the engine core. What tenants share
(quotas, the memory of bodies, metrics) it asks the owner for, at the other end of a channel. It lives as long as both.
"""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from evenhand_engine.backends.engine_client import ConnectedCore, Core
from evenhand_engine.backends.local import LocalBackend
from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.door_messages import Idle, Serving, StartFailed, ToOwner
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.frontend.remote_door import RemoteDoor
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.logs import configure_logging
from evenhand_engine.server.api_servers import ApiServers, spawn
from evenhand_engine.server.app import build_app
from evenhand_engine.server.listener import tls_context
from evenhand_engine.server.tasks import (
    GRACE_SECONDS,
    background,
    first_of,
    in_daemon_thread,
    keep_loop_free,
    serve_public,
)
from evenhand_engine.signals import leave_to_the_first
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ApiServerArguments:
    """What the process is started with.

    Attributes:
        model_dir: directory of the model, for its tokenizer.
        core: pipe to the engine core.
        owner: socket of the channel to the owner.
        listener: listening socket of the public port; that of others may be bound to the same port.
        log_level: of everything that it logs.
    """

    settings: ServerSettings
    model_dir: Path
    core: Connection
    owner: socket.socket
    listener: socket.socket
    log_level: int


def start_api_servers(
    settings: ServerSettings, model_dir: Path, core: Core, listeners: Sequence[socket.socket]
) -> ApiServers:
    """One for each of the listeners, each with a pipe of its own to `core`."""

    def start(owner: socket.socket, listener: socket.socket) -> BaseProcess:
        log_level = logging.getLogger().getEffectiveLevel()
        with core.connect() as connection:
            return spawn(
                run_api_server, ApiServerArguments(settings, model_dir, connection, owner, listener, log_level)
            )

    return ApiServers(start, ToOwner, listeners)


def run_api_server(arguments: ApiServerArguments) -> None:
    """Entry point of the process."""
    run_process(arguments.log_level, _serve(arguments))


def run_process(log_level: int, serving: Coroutine[Any, Any, int]) -> NoReturn:
    """What an owner's process does from its first to its last: `serving` gives its exit code."""
    leave_to_the_first()
    configure_logging(logging.getLevelName(log_level))
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(serving))


async def _serve(arguments: ApiServerArguments) -> int:
    door = RemoteDoor(arguments.settings)
    await door.channel.open(arguments.owner)
    return await serve_for_owner(door, lambda stack: _start(stack, arguments, door))


Started = tuple[asyncio.AbstractServer, asyncio.Event]
"""Who listens at the public port; what is set when there is nothing to serve any more."""


async def serve_for_owner(door: RemoteDoor, start: Callable[[contextlib.AsyncExitStack], Awaitable[Started]]) -> int:
    """Serve until drained; returns the exit code."""
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(door.channel.close)
        try:
            listening, died = await start(stack)
        except StartupError as error:
            door.channel.send(StartFailed(str(error)))
            return 1
        await stack.enter_async_context(background(_leave_port(door, listening)))
        door.channel.send(Serving())
        await first_of(door.told_to_stop.wait(), died.wait())
        if not died.is_set():
            await first_of(door.active.wait_until_none(), died.wait())
        if not died.is_set():
            door.channel.send(Idle())  # and go on to say that it drains, until all have
            await first_of(door.left_alone.wait(), died.wait())
        if died.is_set():  # the owner knows why, and has said it
            await first_of(door.active.wait_until_none(), timeout=GRACE_SECONDS)
        return 0 if door.told_to_stop.is_set() else 1


async def _leave_port(door: RemoteDoor, listening: asyncio.AbstractServer) -> None:
    """To whoever is started in the owner's place: what runs here may need long to end."""
    await door.left_alone.wait()
    listening.close()


async def first_config(door: RemoteDoor) -> None:
    """Wait for it. Raises StartupError if the owner ends before."""
    await first_of(door.configured.wait(), door.told_to_stop.wait())
    if not door.configured.is_set():
        raise StartupError("the server has ended")


async def _start(stack: contextlib.AsyncExitStack, arguments: ApiServerArguments, door: RemoteDoor) -> Started:
    settings = arguments.settings
    tls = tls_context(settings)
    backend = LocalBackend(ConnectedCore(arguments.core), arguments.core)
    stack.push_async_callback(backend.close)
    tokenizer = backend.tokenizer = await in_daemon_thread(lambda: Tokenizer(arguments.model_dir))
    compiler = Compiler(lambda: tokenizer)
    compiler.prepare_aside()
    await backend.start()
    await first_config(door)
    service = EngineService(settings, backend, tokenizer, compiler, door)
    stack.callback(service.close)
    listening = await serve_public(stack, build_app(service), arguments.listener, settings, tls)
    keep_loop_free()
    return listening, backend.died
