"""The public application: OpenAI's routes and what stands around every one of them.

Outermost first: writing, request id and access log, errors as OpenAI's error body, authentication, refusal while draining, what
a body held.
"""

import contextlib
import logging
import time
from typing import Any

from aiohttp import web

from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.door import DOOR, RateLimit
from evenhand_engine.frontend.engine_service import ENGINE, EngineService
from evenhand_engine.frontend.keys import BODY, LOG_FIELDS, REQUEST_ID, SETTINGS, TENANT_ID, WRITES
from evenhand_engine.frontend.requests import request_id
from evenhand_engine.frontend.write_timeout import WriteTimeout
from evenhand_engine.openai.errors import (
    error_response,
    refuse_dead_engine,
    refuse_draining,
    refuse_http,
    refuse_unconfigured,
)
from evenhand_engine.server.cors import add_origin, answer_preflights
from evenhand_engine.server.openapi import show_openapi
from evenhand_engine.server.routes import ROUTES, Handler, refuse_route, wait_to_be_read

log = logging.getLogger(__name__)
access_log = logging.getLogger("evenhand.access")

_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; only in the log
PROBES = web.AppKey("probes", frozenset[Any])
_NO_TENANT = "none"  # in the metrics: the request has not proved to be anybody's


def build_app(service: EngineService) -> web.Application:
    app = web.Application(
        middlewares=[bound_writes, log_access, answer_preflights, answer_errors, authenticate, release_body],
        client_max_size=service.settings.max_request_bytes,
    )
    app[ENGINE] = service
    app[DOOR], app[SETTINGS] = service.door, service.settings
    app[PROBES] = frozenset({show_openapi, *(route.handler for route in ROUTES if route.is_open)})
    app.on_response_prepare.extend((add_headers, add_origin))
    app.add_routes(web.RouteDef(r.method, r.path, r.handler, {"expect_handler": wait_to_be_read}) for r in ROUTES)
    app.router.add_get("/openapi.json", show_openapi)
    app.router.add_route("*", "/{path:.*}", refuse_route, expect_handler=wait_to_be_read)
    return app


@web.middleware
async def bound_writes(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Write the answer, and end the connection of a client that does not take it."""
    with WriteTimeout(request.transport, request.app[SETTINGS].write_timeout) as writes:
        request[WRITES] = writes
        try:
            response = await handler(request)
            if not response.prepared:
                await response.prepare(request)
                await writes.wait(response.write_eof())
            return response
        except ConnectionResetError:
            if request.transport is not None and not request.transport.is_closing():
                raise
            return web.Response(
                status=_CLIENT_CLOSED_REQUEST
            )  # for nobody: the client has gone, as the access log says
        finally:
            if writes.expired:
                request.app[DOOR].count_stalled(request.get(TENANT_ID, _NO_TENANT))


@web.middleware
async def log_access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """One line for each request: never a credential, a prompt or an output."""
    request[REQUEST_ID] = request_id(request)
    request[LOG_FIELDS] = dict[str, Any]()
    started_at = time.monotonic()
    status = _CLIENT_CLOSED_REQUEST
    reason = ""
    try:
        response = await handler(request)
        status, reason = response.status, response.headers.get("X-Evenhand-Reason", "")
        return response
    finally:
        fields: dict[str, Any] = {
            "method": request.method,
            "path": request.path,
            "status": status,
            "tenant": request.get(TENANT_ID, ""),
            "reason": reason,
            "request_id": request[REQUEST_ID],
            "seconds": round(time.monotonic() - started_at, 4),
        }
        extra = request[LOG_FIELDS]
        fields |= extra
        level = logging.DEBUG if is_probe(request) else logging.INFO
        access_log.log(level, "request", extra={"fields": fields})


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refusal as refusal:
        return refuse(request, refusal)
    except EngineDeadError:
        return refuse(request, refuse_dead_engine(draining=request.app[DOOR].draining))
    except web.HTTPException as error:
        response = refuse(request, refuse_http(error))
        if "Allow" in error.headers:  # of a 405
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except ConnectionResetError:
        raise
    except Exception:
        log.exception("request failed", extra={"fields": {"request_id": request[REQUEST_ID]}})
        return refuse(request, Refusal(500, "internal_error", "The server failed to answer.", retry_after=1))


def refuse(request: web.Request, refusal: Refusal) -> web.Response:
    door = request.app[DOOR]
    door.count_refusal(request.get(TENANT_ID, _NO_TENANT), refusal.code)
    response = error_response(refusal)
    if door.draining:
        response.force_close()  # so that the client's next request goes where one is served
    return response


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Before the body is read: a stranger costs a hash and no memory."""
    door = request.app[DOOR]
    if is_probe(request):
        return await handler(request)
    if not door.is_configured:
        raise refuse_unconfigured()
    request[TENANT_ID] = door.authenticator.authenticate(request.headers)
    if door.draining:
        raise refuse_draining()
    with door.active:
        return await handler(request)


@web.middleware
async def release_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give back what the body held of its tenant's memory, if its handler let it in."""
    try:
        return await handler(request)
    finally:
        if (body := request.get(BODY)) is not None:
            body.release()


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "evenhand"
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
    if (tenant_id := request.get(TENANT_ID)) is None:
        return
    with contextlib.suppress(EngineDeadError):  # nobody is left who knows the quotas
        for quota in await request.app[DOOR].rate_limits(tenant_id):
            _add_rate_limit(response, quota)


def _add_rate_limit(response: web.StreamResponse, quota: RateLimit) -> None:
    response.headers[f"x-ratelimit-limit-{quota.unit}"] = str(quota.limit)
    response.headers[f"x-ratelimit-remaining-{quota.unit}"] = str(quota.remaining)
    response.headers[f"x-ratelimit-reset-{quota.unit}"] = f"{quota.reset}s"


def is_probe(request: web.Request) -> bool:
    """Whether anybody may ask, since the answer says nothing of tenants and costs nothing."""
    return request.match_info.handler in request.app[PROBES]
