"""The sidecar's public application: probes of our own, and everything else passed on to the upstream."""

from aiohttp import web

from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.keys import SETTINGS
from evenhand_engine.server.app import (
    PROBES,
    add_headers,
    answer_errors,
    authenticate,
    bound_writes,
    log_access,
    release_body,
)
from evenhand_engine.server.information import show_health, show_metrics, show_ready
from evenhand_engine.server.routes import wait_to_be_read
from evenhand_engine.sidecar.front import FRONT, Front
from evenhand_engine.sidecar.passing import pass_on


def build_sidecar_app(front: Front) -> web.Application:
    app = web.Application(
        middlewares=[bound_writes, log_access, answer_errors, authenticate, release_body],
        client_max_size=front.settings.max_request_bytes,
    )
    app[FRONT] = front
    app[DOOR], app[SETTINGS] = front.door, front.settings
    app[PROBES] = frozenset({show_health, show_ready, show_metrics})
    app.on_response_prepare.append(add_headers)
    app.add_routes(
        [
            web.get("/health", show_health),
            web.get("/ready", show_ready),
            web.get("/metrics", show_metrics),
            web.route("*", "/{path:.*}", pass_on, expect_handler=wait_to_be_read),
        ]
    )
    return app
