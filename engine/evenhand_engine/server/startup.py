"""Start-up: bind, spawn the engine core, build the applications while it loads, serve; and all of it backwards.

The core needs seconds to import torch and load a model. So it is spawned as early as it can be, and what this process
needs for HTTP is imported meanwhile.
"""

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evenhand_engine.backends.engine_client import Core, spawn_core
from evenhand_engine.backends.local import LocalBackend
from evenhand_engine.config import EngineConfig
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.server.listener import (
    allow_many_connections,
    listen,
    listen_together,
    tls_context,
    url_of,
    watch_certificate,
)
from evenhand_engine.server.loading import tell_of_loading
from evenhand_engine.server.tasks import background, first_of, in_daemon_thread, keep_loop_free, serve_app

if TYPE_CHECKING:
    from evenhand_engine.backends.upstream_connection import UpstreamSettings
    from evenhand_engine.frontend.config_in_force import ConfigInForce
    from evenhand_engine.frontend.push_receiver import PushReceiver
    from evenhand_engine.frontend.service import EngineService, Service
    from evenhand_engine.server.api_servers import ApiServers
    from evenhand_engine.sidecar.front import Front

SpawnCore = Callable[[EngineConfig], tuple[Core, Connection]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Running:
    """A server that accepts requests.

    Attributes:
        engine: what serves the public port of our own engine in this process; None where nothing does.
        front: what serves that of a sidecar.
        api_servers: the processes that serve it instead; None where this one does.
    """

    service: "Service"
    url: str
    admin_url: str
    engine: "EngineService | None" = None
    front: "Front | None" = None
    api_servers: "ApiServers | None" = None

    @property
    def failure(self) -> str | None:
        """Why it can serve no more; None while it can."""
        failure = self.service.backend.failure
        return failure if failure or self.api_servers is None else self.api_servers.failure

    async def wait_until_failed(self) -> None:
        if self.api_servers is None:
            await self.service.backend.died.wait()
        else:
            await first_of(self.service.backend.died.wait(), self.api_servers.failed.wait())

    def drain(self) -> None:
        """Refuse what is new."""
        self.service.draining = True
        if self.api_servers is not None:
            self.api_servers.drain()

    async def wait_until_idle(self) -> None:
        """Until nothing is answered; probes aside."""
        await self.service.wait_until_idle()

    async def cut(self) -> None:
        """End what is still answered, with an event that says why."""
        await self.service.backend.close()
        if self.api_servers is not None:
            self.api_servers.cut()


@contextlib.asynccontextmanager
async def start_server(
    settings: ServerSettings, config: EngineConfig, *, spawn: SpawnCore = spawn_core
) -> AsyncIterator[Running]:
    """A server that accepts requests; on leaving, everything is stopped. Raises StartupError.

    Clients that connect while the model is being loaded wait for some seconds, and are told then how far it has come.
    """
    async with contextlib.AsyncExitStack() as stack:
        allow_many_connections()
        tls = tls_context(settings)
        publics = listen_together(settings.host, settings.port, "--port", settings.api_server_count)
        for public in publics:
            stack.enter_context(public)
        admin = stack.enter_context(listen(settings.admin_host, settings.admin_port, "--admin-port"))
        async with tell_of_loading([(admin, None), *((public, tls) for public in publics)]):
            directory = await in_daemon_thread(lambda: resolve_model_dir(config.model))
            load_model_config(directory)  # the core needs it, but what can be refused should not wait for torch
            core, connection = spawn(config)
            backend = LocalBackend(core, connection)
            stack.push_async_callback(backend.close)

            from evenhand_engine.frontend.door import OwnDoor
            from evenhand_engine.frontend.doorkeeper import Doorkeeper
            from evenhand_engine.frontend.service import EngineService, Service
            from evenhand_engine.server.admin import build_admin_app
            from evenhand_engine.server.app import build_app
            from evenhand_engine.server.malformed import keep_out_of_logs
            from evenhand_engine.text.tokenizer import Tokenizer

            api_servers = None
            if len(publics) > 1:
                from evenhand_engine.server.api_server import start_api_servers

                api_servers = start_api_servers(settings, directory, core, publics)
                stack.push_async_callback(api_servers.close)
            in_force = await in_daemon_thread(lambda: _initial_config(settings))
            if api_servers is None:
                backend.tokenizer = await in_daemon_thread(lambda: Tokenizer(directory))
            await backend.start()
        service = Service(settings, backend, in_force)
        keep_out_of_logs()
        await serve_app(stack, build_admin_app(service, _push_receiver(service)), admin, None)
        engine = None
        if api_servers is not None:
            await api_servers.serve(service, lambda channel: Doorkeeper(service, channel, backend.count_elsewhere))
        else:
            assert backend.tokenizer is not None
            engine = EngineService(settings, backend, backend.tokenizer, OwnDoor(service))
            stack.callback(engine.close)
            await serve_app(stack, build_app(engine), publics[0], tls, decompress=False)  # `read_body` does
            if tls is not None:
                await stack.enter_async_context(background(watch_certificate(settings, tls)))
        await stack.enter_async_context(_watch_policies(service))
        keep_loop_free()
        if engine is not None:
            engine.compiler.prepare_aside()
        url = url_of("http" if tls is None else "https", publics[0])
        yield Running(service, url, url_of("http", admin), engine, api_servers=api_servers)


@contextlib.asynccontextmanager
async def start_sidecar(
    settings: ServerSettings,
    upstream_settings: "UpstreamSettings",
    *,
    priority: str = "off",
    salts_caches: bool = False,
    tokenizer: Path | None = None,
) -> AsyncIterator[Running]:
    """A sidecar that accepts requests, whether or not its upstream does yet; on leaving, everything is stopped.

    With several API servers these pass requests on, and this process says when.

    `tokenizer`: directory of the model's, to count prompts with. Raises StartupError.
    """
    from evenhand_engine.backends.upstream import Upstream
    from evenhand_engine.backends.upstream_connection import UpstreamConnection
    from evenhand_engine.dispatch.dispatcher import Dispatcher, DispatchSettings
    from evenhand_engine.dispatch.window import Window
    from evenhand_engine.frontend.door import OwnDoor
    from evenhand_engine.server.admin import build_admin_app
    from evenhand_engine.server.malformed import keep_out_of_logs
    from evenhand_engine.server.sidecar_app import build_sidecar_app
    from evenhand_engine.sidecar.front import Front, PassingOptions, UpstreamPriority
    from evenhand_engine.sidecar.service import SidecarService
    from evenhand_engine.sidecar.ticket import OwnTickets
    from evenhand_engine.text.tokenizer import Tokenizer

    async with contextlib.AsyncExitStack() as stack:
        allow_many_connections()
        tls = tls_context(settings)
        publics = listen_together(settings.host, settings.port, "--port", settings.api_server_count)
        for public in publics:
            stack.enter_context(public)
        admin = stack.enter_context(listen(settings.admin_host, settings.admin_port, "--admin-port"))
        options = PassingOptions(
            priority=UpstreamPriority(priority), salt_key=secrets.token_bytes(32) if salts_caches else None
        )
        front = api_servers = None
        if len(publics) > 1:
            from evenhand_engine.server.sidecar_server import start_sidecar_servers
            from evenhand_engine.sidecar.ticket_keeper import TicketKeeper

            api_servers = start_sidecar_servers(settings, upstream_settings, options, tokenizer, publics)
            stack.push_async_callback(api_servers.close)
        in_force = await in_daemon_thread(lambda: _initial_config(settings))
        dispatcher = Dispatcher(
            Window(), in_force.config, DispatchSettings(max_model_len=upstream_settings.max_model_len)
        )
        upstream = Upstream(UpstreamConnection(upstream_settings), dispatcher)
        stack.push_async_callback(upstream.close)
        service = SidecarService(settings, upstream, in_force)
        upstream.start()
        keep_out_of_logs()
        await serve_app(stack, build_admin_app(service, _push_receiver(service), tells_of_drains=True), admin, None)
        if api_servers is not None:
            await api_servers.serve(service, lambda channel: TicketKeeper(service, channel))
        else:
            counter = None if tokenizer is None else await in_daemon_thread(lambda: Tokenizer(tokenizer))
            front = Front(
                settings, upstream.connection, OwnDoor(service), OwnTickets(service), options, tokenizer=counter
            )
            stack.callback(front.close)
            await serve_app(stack, build_sidecar_app(front), publics[0], tls, decompress=False)  # `read_body` does
            if tls is not None:
                await stack.enter_async_context(background(watch_certificate(settings, tls)))
        await stack.enter_async_context(_watch_policies(service))
        keep_loop_free()
        url = url_of("http" if tls is None else "https", publics[0])
        yield Running(service, url, url_of("http", admin), front=front, api_servers=api_servers)


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

    return PushReceiver(
        service.settings.push, service.in_force, ailment=service.ailment, backend=lambda: service.backend_name
    )


@contextlib.asynccontextmanager
async def _watch_policies(service: "Service") -> AsyncIterator[None]:
    if service.settings.policies is None:
        yield
        return
    from evenhand_engine.frontend.policy_source import PolicySource

    source = PolicySource(service.settings.policies, service.in_force)
    async with background(source.run()):
        yield
