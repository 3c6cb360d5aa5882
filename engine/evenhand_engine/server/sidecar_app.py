"""The sidecar's public application: probes of our own, and everything else passed on to the upstream."""

from aiohttp import web

from evenhand_engine.frontend.door import DOOR, OwnDoor
from evenhand_engine.frontend.service import SERVICE, SETTINGS
from evenhand_engine.openai.responses import metrics_response
from evenhand_engine.server.app import (
    PROBES,
    add_headers,
    answer_errors,
    authenticate,
    bound_writes,
    hold_body,
    log_access,
)
from evenhand_engine.server.information import show_health, show_ready
from evenhand_engine.server.routes import wait_to_be_read
from evenhand_engine.sidecar.passing import pass_on
from evenhand_engine.sidecar.service import SIDECAR, SidecarService


def build_sidecar_app(service: SidecarService) -> web.Application:
    app = web.Application(
        middlewares=[bound_writes, log_access, answer_errors, authenticate, hold_body],
        client_max_size=service.settings.max_request_bytes,
    )
    app[SERVICE] = app[SIDECAR] = service
    app[DOOR], app[SETTINGS] = OwnDoor(service), service.settings
    app[PROBES] = frozenset({show_health, show_ready, show_upstream_metrics})
    app.on_response_prepare.append(add_headers)
    app.add_routes(
        [
            web.get("/health", show_health),
            web.get("/ready", show_ready),
            web.get("/metrics", show_upstream_metrics),
            web.route("*", "/{path:.*}", pass_on, expect_handler=wait_to_be_read),
        ]
    )
    return app


async def show_upstream_metrics(request: web.Request) -> web.Response:
    """The upstream's own metrics as last scraped, and the window's: nothing of tenants, theirs are on the admin port."""
    service = request.app[SIDECAR]
    return metrics_response(service.upstream.metrics_text + service.window_metrics())
