"""An engine pod without a model: the real code of the admin port, and `/health`, which is well once there is a config.

It can be told to be of an older version, to claim a version that nobody made, to have a clock that is wrong, and what to
make of documents with tenants of certain names: to refuse them, or to die of them.
"""

import argparse
import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from unittest import mock

import msgspec
from aiohttp import web

from evenhand_engine.frontend.config_in_force import ConfigInForce, Enforce
from evenhand_engine.frontend.config_store import ConfigDocument, LastGoodFile
from evenhand_engine.frontend.push_receiver import PushReceiver, PushSettings
from evenhand_policy.config import PoolReference, SchedulerConfig
from evenhand_policy.push_document import DocumentRejectedError, understood_members
from evenhand_policy.push_protocol import ConfigSource
from evenhand_policy.version import Version


def build_app(
    settings: PushSettings,
    enforce: Enforce = lambda offered: None,
    claimed_epoch: int = 0,
    clock: Callable[[], float] = time.time,
) -> web.Application:
    """The admin application; `enforce` is told what to enforce. `GET /config` shows the document in force."""
    last_good = LastGoodFile(settings.last_good) if settings.last_good else None
    in_force = ConfigInForce(ConfigDocument.unversioned(SchedulerConfig(), ConfigSource.BUILT_IN), last_good)
    in_force.on_change(enforce)
    receiver = PushReceiver(settings, in_force, clock=clock)
    if claimed_epoch:
        claimed = in_force.assignment._replace(version=Version(claimed_epoch, 1))
        in_force.document = dataclasses.replace(in_force.document, assignment=claimed)

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


def _enforce_unless(refused: Collection[str], deadly: Collection[str]) -> Enforce:
    """Enforces nothing; refuses, or dies of, documents with these tenants."""

    def enforce(offered: ConfigDocument) -> None:
        tenants = {tenant.tenant_id for tenant in offered.config.tenants}
        if tenants & set(deadly):
            os._exit(1)
        if unwanted := tenants & set(refused):
            raise DocumentRejectedError("tenants", f"cannot enforce {', '.join(sorted(unwanted))}")

    return enforce


async def serve(arguments: argparse.Namespace) -> None:
    """Until cancelled."""
    namespace, _, name = arguments.pool.partition("/")
    pool = PoolReference(namespace=namespace, name=name)
    settings = PushSettings(pool, arguments.bootstrap, arguments.pod_token, arguments.last_good)
    if arguments.lacks:  # an engine of before these members were added to documents
        known = understood_members() - set(arguments.lacks)
        mock.patch("evenhand_engine.frontend.push_receiver.understood_members", lambda: known).start()
    enforce = _enforce_unless(arguments.refuses, arguments.dies_of)
    runner = web.AppRunner(
        build_app(settings, enforce, arguments.claims_epoch, lambda: time.time() + arguments.clock_ahead),
        access_log=None,
    )
    await runner.setup()
    await web.TCPSite(runner, arguments.host, arguments.port).start()
    await asyncio.Event().wait()


def main() -> None:
    """Options as those of `evenhand serve`, and what is wrong with it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--bootstrap", type=Path, required=True)
    parser.add_argument("--pod-token", type=Path)
    parser.add_argument("--last-good", type=Path)
    parser.add_argument("--refuses", action="append", default=[], metavar="TENANT")
    parser.add_argument("--dies-of", action="append", default=[], metavar="TENANT")
    parser.add_argument("--lacks", action="append", default=[], metavar="MEMBER")
    parser.add_argument("--claims-epoch", type=int, default=0)
    parser.add_argument("--clock-ahead", type=float, default=0, metavar="SECONDS")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
