"""Reading requests: the body within its limits of size and time, and a client's request id made safe."""

import asyncio
import re
import uuid

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.service import BODY

_BODY_TIMEOUT_SECONDS = 60.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


async def read_body(request: web.Request) -> bytes:
    """The whole body; raises Refusal 413 if it is too large, 408 if it comes too slowly, 400 if it is garbled."""
    if (request.content_length or 0) > request.client_max_size:
        raise _too_large(request)
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_SECONDS):
            raw = await _read(request)
    except TimeoutError as error:
        raise Refusal(408, "request_timeout", "The body did not arrive in time.") from error
    except web.RequestPayloadError as error:
        message = f"The body is not what its headers say, such as its chunks or its Content-Encoding: {error}."
        raise Refusal(400, "invalid_body", message) from error
    if (held := request.get(BODY)) is not None:
        held.resize(len(raw))
    return raw


async def _read(request: web.Request) -> bytes:
    """Unlike `request.read`, which keeps the body for as long as the request."""
    chunks, size = [], 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size > request.client_max_size:
            raise _too_large(request)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(request: web.Request) -> Refusal:
    return Refusal(413, "request_too_large", f"The body is larger than {request.client_max_size} bytes.")


def request_id(request: web.Request) -> str:
    """The client's X-Request-Id if it is short and plain, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
