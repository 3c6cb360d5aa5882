"""Errors as HTTP answers: OpenAI's error body, with a machine-readable reason and a truthful Retry-After."""

import math
from typing import Any

import msgspec
from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.openai.answers import Error, ErrorDetails
from evenhand_engine.scheduler.request import FinishReason

_RESTART_SECONDS = 10.0  # what a supervisor needs to start another process, about
_LOADING_SECONDS = 5.0  # of minutes that it may take
STATUSES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "server_error",
    503: "service_unavailable_error",
}
"""The type of an error, by its status."""


def error_body(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's error object; the same in a JSON answer and in an event of a stream."""
    kind = STATUSES.get(refusal.status, "server_error")
    body: dict[str, Any] = msgspec.to_builtins(Error(ErrorDetails(refusal.message, kind, refusal.param, refusal.code)))
    return body


def error_response(refusal: Refusal) -> web.Response:
    response = web.Response(
        status=refusal.status, body=msgspec.json.encode(error_body(refusal)), content_type="application/json"
    )
    response.headers["X-Evenhand-Reason"] = refusal.code
    if refusal.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after)))
    else:
        response.headers["x-should-retry"] = "false"
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def refuse_http(error: web.HTTPException) -> Refusal:
    """aiohttp's own errors (no such route, body too large, ...) in our words."""
    code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status, "invalid_request")
    return Refusal(error.status, code, f"{error.reason}.")


def refuse_loading(stage: str) -> Refusal:
    """There is no engine yet."""
    return Refusal(503, "loading", f"The server is starting: {stage}.", retry_after=_LOADING_SECONDS)


def refuse_draining() -> Refusal:
    return Refusal(503, "draining", "The server is shutting down.", retry_after=_RESTART_SECONDS)


def refuse_unconfigured() -> Refusal:
    """Who may use the engine is not known yet, so nobody may."""
    return Refusal(503, "not_configured", "The server waits for its policies.", retry_after=_RESTART_SECONDS)


def refuse_dead_engine(*, draining: bool) -> Refusal:
    """The process is about to exit: by itself, or because a drain took too long.

    Why the engine died is in the log alone: it may tell of another tenant's request.
    """
    if draining:
        return refuse_draining()
    return Refusal(503, "engine_dead", "The engine is gone; it is about to be restarted.", retry_after=_RESTART_SECONDS)


def refuse_finished(reason: FinishReason, queue_delay: float) -> Refusal | None:
    """How a request that the engine ended without a result is refused; None where it has one.

    Args:
        queue_delay: seconds until the tenant's queue has a free place.
    """
    match reason:
        case FinishReason.STOP | FinishReason.LENGTH:
            return None
        case FinishReason.QUEUE_TIMEOUT:
            message = "The request waited longer than the policy's queueTimeout."
            return Refusal(503, "queue_timeout", message, retry_after=queue_delay)
        case FinishReason.TENANT_SUSPENDED:
            return Refusal(403, "tenant_suspended", "The tenant was suspended while the request was queued.")
        case FinishReason.OVERLOADED:
            message = "The request can never fit into the tenant's part of the KV cache. Shorten it."
            return Refusal(400, "overloaded", message)
        case FinishReason.ABORT:
            return refuse_draining()
        case FinishReason.GRAMMAR:
            message = "The grammar of the output became too complex to be followed further. Make it simpler."
            return Refusal(400, "grammar_too_complex", message)
        case FinishReason.ERROR:
            return Refusal(500, "engine_error", "The engine failed to compute this request.", retry_after=1)
