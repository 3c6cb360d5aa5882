"""Start-up of our own engine: bind, spawn its core, build the applications while it loads, serve; and all of it backwards.

The core needs seconds to import torch and load a model. So it is spawned as early as it can be, and what this process
needs for HTTP is imported meanwhile.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from evenhand_engine.backends.engine_client import Core, spawn_core
from evenhand_engine.config import EngineConfig
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.server.listener import Ports
from evenhand_engine.server.loading import tell_of_loading
from evenhand_engine.server.tasks import background, first_of, in_daemon_thread, keep_loop_free, serve_app, serve_public

if TYPE_CHECKING:
    from evenhand_engine.frontend.config_in_force import ConfigInForce
    from evenhand_engine.frontend.engine_service import EngineService
    from evenhand_engine.frontend.push_receiver import PushReceiver
    from evenhand_engine.frontend.service import Service
    from evenhand_engine.server.api_servers import ApiServers
    from evenhand_engine.sidecar.front import Front

SpawnCore = Callable[[EngineConfig], tuple[Core, Connection]]


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
        ports = Ports(stack, settings)
        async with tell_of_loading([(ports.admin, None), *((public, ports.tls) for public in ports.publics)]):
            directory = await in_daemon_thread(lambda: resolve_model_dir(config.model))
            load_model_config(directory)  # the core needs it, but what can be refused should not wait for torch
            core, connection = spawn(config)

            from evenhand_engine.backends.local import LocalBackend

            backend = LocalBackend(core, connection)
            stack.push_async_callback(backend.close)

            from evenhand_engine.frontend.door import OwnDoor
            from evenhand_engine.frontend.doorkeeper import Doorkeeper
            from evenhand_engine.frontend.engine_service import EngineService
            from evenhand_engine.frontend.service import Service
            from evenhand_engine.server.admin import build_admin_app
            from evenhand_engine.server.app import build_app
            from evenhand_engine.structured.compiler import Compiler
            from evenhand_engine.text.tokenizer import Tokenizer

            api_servers = compiler = None
            if len(ports.publics) > 1:
                from evenhand_engine.server.api_server import start_api_servers

                api_servers = start_api_servers(settings, directory, core, ports.publics)
                stack.push_async_callback(api_servers.close)
            in_force = await in_daemon_thread(lambda: initial_config(settings))
            if api_servers is None:
                tokenizer = await in_daemon_thread(lambda: Tokenizer(directory))
                backend.tokenizer, compiler = tokenizer, Compiler(lambda: tokenizer)
                compiler.prepare_aside()
            await backend.start()
        service = Service(settings, backend, in_force)
        await serve_app(stack, build_admin_app(service, push_receiver(service)), ports.admin, None)
        engine = None
        if api_servers is not None:
            await api_servers.serve(service, lambda channel: Doorkeeper(service, channel, backend.count_elsewhere))
        else:
            assert backend.tokenizer is not None and compiler is not None
            engine = EngineService(settings, backend, backend.tokenizer, compiler, OwnDoor(service))
            stack.callback(engine.close)
            await serve_public(stack, build_app(engine), ports.publics[0], settings, ports.tls)
        await stack.enter_async_context(watch_policies(service))
        keep_loop_free()
        yield Running(service, ports.url, ports.admin_url, engine, api_servers=api_servers)


def initial_config(settings: ServerSettings) -> "ConfigInForce":
    """The policies' directory, what was pushed last, or what is built in. Raises StartupError."""
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


def push_receiver(service: "Service") -> "PushReceiver | None":
    """What takes the operator's pushes; None where nobody may push."""
    if service.settings.push is None:
        return None
    from evenhand_engine.frontend.push_receiver import PushReceiver

    return PushReceiver(
        service.settings.push, service.in_force, ailment=service.ailment, backend=lambda: service.backend_name
    )


@contextlib.asynccontextmanager
async def watch_policies(service: "Service") -> AsyncIterator[None]:
    """Meanwhile, let an edit of the policies' directory be in force at once, where there is one."""
    if service.settings.policies is None:
        yield
        return
    from evenhand_engine.frontend.policy_source import PolicySource

    source = PolicySource(service.settings.policies, service.in_force)
    async with background(source.run()):
        yield
