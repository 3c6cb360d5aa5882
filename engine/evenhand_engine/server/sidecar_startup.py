"""Start-up of a sidecar: bind, begin to probe the upstream, serve; and all of it backwards."""

import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

from evenhand_engine.backends.upstream import Upstream
from evenhand_engine.backends.upstream_connection import UpstreamConnection, UpstreamSettings
from evenhand_engine.dispatch.dispatcher import Dispatcher, DispatchSettings
from evenhand_engine.dispatch.window import Window
from evenhand_engine.frontend.door import OwnDoor
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.admin import build_admin_app
from evenhand_engine.server.listener import Ports
from evenhand_engine.server.sidecar_app import build_sidecar_app
from evenhand_engine.server.sidecar_server import start_sidecar_servers
from evenhand_engine.server.startup import Running, initial_config, push_receiver, watch_policies
from evenhand_engine.server.tasks import in_daemon_thread, keep_loop_free, serve_app, serve_public
from evenhand_engine.sidecar.front import Front, PassingOptions, UpstreamPriority
from evenhand_engine.sidecar.service import SidecarService
from evenhand_engine.sidecar.ticket import OwnTickets
from evenhand_engine.sidecar.ticket_keeper import TicketKeeper
from evenhand_engine.text.tokenizer import Tokenizer


@contextlib.asynccontextmanager
async def start_sidecar(
    settings: ServerSettings,
    upstream_settings: UpstreamSettings,
    *,
    priority: str = "off",
    salts_caches: bool = False,
    tokenizer: Path | None = None,
) -> AsyncIterator[Running]:
    """A sidecar that accepts requests, whether or not its upstream does yet; on leaving, everything is stopped.

    With several API servers these pass requests on, and this process says when.

    `tokenizer`: directory of the model's, to count prompts with. Raises StartupError.
    """
    salt_key = secrets.token_bytes(32) if salts_caches else None
    options = PassingOptions(priority=UpstreamPriority(priority), salt_key=salt_key)
    async with contextlib.AsyncExitStack() as stack:
        ports = Ports(stack, settings)
        front = api_servers = None
        if len(ports.publics) > 1:
            api_servers = start_sidecar_servers(settings, upstream_settings, options, tokenizer, ports.publics)
            stack.push_async_callback(api_servers.close)
        service = await _start_service(stack, settings, upstream_settings)
        admin_app = build_admin_app(service, push_receiver(service), tells_of_drains=True)
        await serve_app(stack, admin_app, ports.admin, None)
        if api_servers is not None:
            await api_servers.serve(service, lambda channel: TicketKeeper(service, channel))
        else:
            counter = None if tokenizer is None else await in_daemon_thread(lambda: Tokenizer(tokenizer))
            door, tickets = OwnDoor(service), OwnTickets(service)
            front = Front(settings, service.upstream.connection, door, tickets, options, counter)
            stack.callback(front.close)
            await serve_public(stack, build_sidecar_app(front), ports.publics[0], settings, ports.tls)
        await stack.enter_async_context(watch_policies(service))
        keep_loop_free()
        yield Running(service, ports.url, ports.admin_url, front=front, api_servers=api_servers)


async def _start_service(
    stack: contextlib.AsyncExitStack, settings: ServerSettings, upstream_settings: UpstreamSettings
) -> SidecarService:
    """The owner of what tenants share, with the config in force and an upstream that is probed."""
    in_force = await in_daemon_thread(lambda: initial_config(settings))
    dispatch_settings = DispatchSettings(max_model_len=upstream_settings.max_model_len)
    dispatcher = Dispatcher(Window(), in_force.config, dispatch_settings)
    upstream = Upstream(UpstreamConnection(upstream_settings), dispatcher)
    stack.push_async_callback(upstream.close)
    service = SidecarService(settings, upstream, in_force)
    upstream.start()
    return service
