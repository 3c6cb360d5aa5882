"""One API server of a sidecar: a process that serves the public port for an owner, which is another process.

It reads bodies, authenticates, counts prompts, and exchanges requests with the upstream over connections of its own. Quotas, the memory of
bodies, metrics, and who is sent next are the owner's, at the other end of a channel. It lives as long as that.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from evenhand_engine.backends.upstream_connection import UpstreamConnection, UpstreamSettings
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.api_server import Started, first_config, run_process, serve_for_owner
from evenhand_engine.server.api_servers import ApiServers, spawn
from evenhand_engine.server.listener import tls_context
from evenhand_engine.server.sidecar_app import build_sidecar_app
from evenhand_engine.server.tasks import background, first_of, in_daemon_thread, keep_loop_free, serve_public
from evenhand_engine.sidecar.front import Front, PassingOptions
from evenhand_engine.sidecar.messages import ToOwner
from evenhand_engine.sidecar.remote_tickets import RemoteTickets
from evenhand_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class SidecarServerArguments:
    """What the process is started with.

    Attributes:
        tokenizer: directory of the model's, to count prompts with; None: there is none.
        owner: socket of the channel to the owner.
        listener: listening socket of the public port; that of others may be bound to the same port.
        log_level: of everything that it logs.
    """

    settings: ServerSettings
    upstream: UpstreamSettings
    options: PassingOptions
    tokenizer: Path | None
    owner: socket.socket
    listener: socket.socket
    log_level: int


def start_sidecar_servers(
    settings: ServerSettings,
    upstream: UpstreamSettings,
    options: PassingOptions,
    tokenizer: Path | None,
    listeners: Sequence[socket.socket],
) -> ApiServers:
    """One for each of the listeners."""

    def start(owner: socket.socket, listener: socket.socket) -> BaseProcess:
        log_level = logging.getLogger().getEffectiveLevel()
        arguments = SidecarServerArguments(settings, upstream, options, tokenizer, owner, listener, log_level)
        return spawn(run_sidecar_server, arguments)

    return ApiServers(start, ToOwner, listeners)


def run_sidecar_server(arguments: SidecarServerArguments) -> None:
    """Entry point of the process."""
    run_process(arguments.log_level, _serve(arguments))


async def _serve(arguments: SidecarServerArguments) -> int:
    connection = UpstreamConnection(arguments.upstream)
    door = RemoteTickets(arguments.settings, connection)
    await door.channel.open(arguments.owner)
    return await serve_for_owner(door, lambda stack: _start(stack, arguments, door, connection))


async def _start(
    stack: contextlib.AsyncExitStack,
    arguments: SidecarServerArguments,
    door: RemoteTickets,
    connection: UpstreamConnection,
) -> Started:
    settings, directory = arguments.settings, arguments.tokenizer
    stack.push_async_callback(connection.close)
    tls = tls_context(settings)
    tokenizer = None if directory is None else await in_daemon_thread(lambda: Tokenizer(directory))
    await first_config(door)
    front = Front(settings, connection, door, door, arguments.options, tokenizer)
    stack.callback(front.close)
    listening = await serve_public(stack, build_sidecar_app(front), arguments.listener, settings, tls)
    await stack.enter_async_context(background(_cut(door, connection, settings.drain_timeout)))
    keep_loop_free()
    return listening, door.told_to_cut


async def _cut(door: RemoteTickets, connection: UpstreamConnection, drain_timeout: float) -> None:
    """End what still runs when the owner says so; when he is gone, after the time that a drain has."""
    await first_of(door.told_to_cut.wait(), door.left_alone.wait())
    if not door.told_to_cut.is_set():
        await asyncio.sleep(drain_timeout)
    door.told_to_cut.set()
    await connection.close()
