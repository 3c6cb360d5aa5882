"""The public application: OpenAI's routes and what stands around every one of them.

Outermost first: writing, request id and access log, errors as OpenAI's error body, authentication, refusal while draining, room
for the body.
"""

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from aiohttp import web

from evenhand_engine.anthropic.api import count_tokens, create_message
from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.door import DOOR, RateLimit
from evenhand_engine.frontend.requests import request_id
from evenhand_engine.frontend.service import (
    BODY,
    ENGINE,
    LOG_FIELDS,
    REQUEST_ID,
    SETTINGS,
    TENANT_ID,
    WRITES,
    EngineService,
)
from evenhand_engine.frontend.write_timeout import WriteTimeout
from evenhand_engine.openai.chat import create_chat_completion
from evenhand_engine.openai.completions import create_completion
from evenhand_engine.openai.errors import (
    error_response,
    refuse_dead_engine,
    refuse_draining,
    refuse_http,
    refuse_unconfigured,
)
from evenhand_engine.openai.response_api import create_response
from evenhand_engine.openai.responses import json_response, metrics_response
from evenhand_engine.openai.tokens import detokenize, tokenize
from evenhand_engine.server.cors import add_origin, answer_preflights

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)
access_log = logging.getLogger("evenhand.access")

_CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; only in the log
_OTHER_MODELS = {
    path
    for name in ("embeddings", "score", "rerank", "pooling", "classify")
    for path in (f"/{name}", f"/v1/{name}", f"/v2/{name}")
}
PROBES = web.AppKey("probes", frozenset[Any])
_NO_TENANT = "none"  # in the metrics: the request has not proved to be anybody's


def build_app(service: EngineService) -> web.Application:
    app = web.Application(
        middlewares=[bound_writes, log_access, answer_preflights, answer_errors, authenticate, hold_body],
        client_max_size=service.settings.max_request_bytes,
    )
    app[ENGINE] = service
    app[DOOR], app[SETTINGS] = service.door, service.settings
    app[PROBES] = frozenset({show_health, show_ready, show_version, show_metrics})
    app.on_response_prepare.extend((add_headers, add_origin))
    app.add_routes(
        web.RouteDef(method, path, handler, {"expect_handler": wait_to_be_read}) for method, path, handler in ROUTES
    )
    return app


async def wait_to_be_read(request: web.Request) -> None:
    """Of `Expect: 100-continue`: aiohttp would send leave at once, before credential and size are known."""


async def refuse_route(request: web.Request) -> web.StreamResponse:
    """No such route: 404, or 405 where another method is known. Nobody gets leave to send a body for it."""
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        allowed |= (await resource.resolve(request))[1]
    if allowed := allowed - {"*"}:
        raise web.HTTPMethodNotAllowed(request.method, allowed)
    if request.path in _OTHER_MODELS:
        raise Refusal(404, "not_found", f"{request.path} is for models that embed or rank; this one generates text.")
    raise web.HTTPNotFound


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
    request.app[DOOR].count_refusal(request.get(TENANT_ID, _NO_TENANT), refusal.code)
    return error_response(refusal)


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
async def hold_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a body take its tenant's memory only: as much as it says, or as it may grow to where it does not say."""
    if not request.body_exists:
        return await handler(request)
    size = None if "Content-Encoding" in request.headers else request.content_length
    limit = request.client_max_size
    body = await request.app[DOOR].hold(request[TENANT_ID], limit if size is None else min(size, limit))
    try:
        request[BODY] = body
        return await handler(request)
    finally:
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


async def list_models(request: web.Request) -> web.Response:
    service = request.app[ENGINE]
    return json_response({"object": "list", "data": [_model(service, name) for name in service.model_names]})


async def show_model(request: web.Request) -> web.Response:
    service, name = request.app[ENGINE], request.match_info["model"]
    service.check_model(name)
    return json_response(_model(service, name))


def _model(service: EngineService, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "evenhand",
        "root": service.info.model_name,
        "parent": None,
        "max_model_len": service.info.max_model_len,
    }


async def show_health(request: web.Request) -> web.Response:
    """200 with an empty body, as vLLM's, only while the engine makes progress."""
    problem = await request.app[DOOR].health()
    return web.Response() if problem is None else error_response(Refusal(503, "unhealthy", problem, retry_after=1))


async def show_ready(request: web.Request) -> web.Response:
    """Like /health, and 503 before there is a config and as soon as the server drains, so that nothing is sent here."""
    if request.app[DOOR].draining:
        return error_response(refuse_draining())
    if not request.app[DOOR].is_configured:
        return error_response(refuse_unconfigured())
    return await show_health(request)


async def show_version(request: web.Request) -> web.Response:
    return json_response({"version": version("evenhand")})


async def show_metrics(request: web.Request) -> web.Response:
    """The `vllm:*` set, which says nothing of tenants; theirs is on the admin port."""
    return metrics_response(await request.app[DOOR].metrics_text())


def is_probe(request: web.Request) -> bool:
    """Whether anybody may ask, since the answer says nothing of tenants and costs nothing."""
    return request.match_info.handler in request.app[PROBES]


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/completions", create_completion),
    ("POST", "/v1/chat/completions", create_chat_completion),
    ("POST", "/v1/responses", create_response),
    ("POST", "/v1/messages", create_message),
    ("POST", "/v1/messages/count_tokens", count_tokens),
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{model:.+}", show_model),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/health", show_health),
    ("GET", "/ready", show_ready),
    ("GET", "/ping", show_health),
    ("POST", "/ping", show_health),
    ("GET", "/version", show_version),
    ("GET", "/metrics", show_metrics),
    ("*", "/{path:.*}", refuse_route),  # the last one: it takes everything
)
"""Method, path and who answers."""
