"""CORS: pages of the origins that `--allowed-origins` names may read answers; without it no page of another origin may."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from evenhand_engine.frontend.keys import SETTINGS

_MAX_AGE_SECONDS = 600  # that a browser remembers what it may send
_EXPOSED = (
    "Retry-After, X-Request-Id, X-Evenhand-Reason, x-should-retry, x-ratelimit-limit-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens"
)


@web.middleware
async def answer_preflights(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whether a page may send what it wants to send: asked by browsers, without a credential."""
    wanted = request.headers.get("Access-Control-Request-Method")
    if request.method != "OPTIONS" or wanted is None or _origin(request) is None:
        return await handler(request)
    headers = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": str(_MAX_AGE_SECONDS)}
    if (names := request.headers.get("Access-Control-Request-Headers")) is not None:
        headers["Access-Control-Allow-Headers"] = names
    return web.Response(status=204, headers=headers)


async def add_origin(request: web.Request, response: web.StreamResponse) -> None:
    """On every answer, refusals too, or the page could not read why."""
    if not request.app[SETTINGS].allowed_origins:
        return
    response.headers.add("Vary", "Origin")
    if (origin := _origin(request)) is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED


def _origin(request: web.Request) -> str | None:
    """The page's, if it is allowed. Named even where all are, since caches must not mix them up."""
    allowed, origin = request.app[SETTINGS].allowed_origins, request.headers.get("Origin")
    return origin if origin is not None and ("*" in allowed or origin in allowed) else None
