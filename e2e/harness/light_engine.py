"""An engine pod without a model: the real code of the admin port, and `/health`, which is well once there is a config."""

import argparse
import asyncio
from pathlib import Path

import msgspec
from aiohttp import web

from evenhand_engine.frontend.config_in_force import ConfigInForce, Enforce
from evenhand_engine.frontend.config_store import ConfigDocument, LastGoodFile
from evenhand_engine.frontend.push_receiver import PushReceiver, PushSettings
from evenhand_policy.config import PoolReference, SchedulerConfig
from evenhand_policy.push_protocol import ConfigSource


def build_app(settings: PushSettings, enforce: Enforce = lambda offered: None) -> web.Application:
    """The admin application; `enforce` is told what to enforce. `GET /config` shows the document in force."""
    last_good = LastGoodFile(settings.last_good) if settings.last_good else None
    in_force = ConfigInForce(ConfigDocument.unversioned(SchedulerConfig(), ConfigSource.BUILT_IN), last_good)
    in_force.on_change(enforce)
    receiver = PushReceiver(settings, in_force)

    async def show_config(_: web.Request) -> web.Response:
        return web.json_response(
            {
                "source": in_force.source,
                "epoch": in_force.assignment.version.epoch,
                "revision": in_force.assignment.version.revision,
                "numReplicas": in_force.num_replicas,
                "config": msgspec.to_builtins(in_force.config),
            }
        )

    async def show_health(_: web.Request) -> web.Response:
        return web.Response(status=503 if in_force.source is ConfigSource.BUILT_IN else 200)

    app = web.Application()
    app.add_routes([*receiver.routes(), web.get("/config", show_config), web.get("/health", show_health)])
    return app


async def serve(arguments: argparse.Namespace) -> None:
    """Until cancelled."""
    namespace, _, name = arguments.pool.partition("/")
    pool = PoolReference(namespace=namespace, name=name)
    settings = PushSettings(pool, arguments.bootstrap, arguments.pod_token, arguments.last_good)
    runner = web.AppRunner(build_app(settings), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, arguments.host, arguments.port).start()
    await asyncio.Event().wait()


def main() -> None:
    """Options as those of `evenhand serve`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--bootstrap", type=Path, required=True)
    parser.add_argument("--pod-token", type=Path)
    parser.add_argument("--last-good", type=Path)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
