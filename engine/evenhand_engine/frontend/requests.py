"""Reading requests: leave to read one, the body within its limits of size and time, and a client's request id made safe."""

import asyncio
import re
import uuid
import zlib
from collections.abc import AsyncIterator

from aiohttp import HttpVersion11, web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.keys import BODY, TENANT_ID

_BODY_TIMEOUT_SECONDS = 60.0
ENCODINGS = ("gzip", "deflate", "identity")
_PIECE_BYTES = 256 * 1024  # of what is unpacked
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS  # whichever of the two the data begins with
_HAS_LEAVE = web.RequestKey("has_leave", bool)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


async def enter(request: web.Request, *, generates: bool = True) -> int:
    """Before anything is read: see `Door.enter`. Returns how many requests of the quota were taken.

    A body may take its tenant's memory only: as much as it says, or as it may grow to where it does not say. Whoever answers the
    request gives it back.
    """
    num_bytes, limit = 0, request.client_max_size
    if request.body_exists:
        size = None if "Content-Encoding" in request.headers else request.content_length
        num_bytes = limit if size is None else min(size, limit)
    request[BODY], num_taken = await request.app[DOOR].enter(request[TENANT_ID], num_bytes, generates=generates)
    return num_taken


async def read_start(request: web.Request) -> bytes:
    """What comes first of the body, as it is; empty if there is none. A client that waits for leave to send gets that here.

    Raises Refusal 501 for an unknown Transfer-Encoding, 408 if it comes too slowly, 400 if it is garbled.
    """
    _check_transfer(request)
    await _give_leave(request)
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_SECONDS):
            return await request.content.readany()
    except TimeoutError as error:
        raise _too_slow() from error
    except web.RequestPayloadError as error:
        raise _garbled(error) from error


async def read_body(request: web.Request, start: bytes = b"") -> bytes:
    """The whole body; see `read_pieces`."""
    return b"".join([piece async for piece in read_pieces(request, start)])


async def read_pieces(request: web.Request, start: bytes = b"") -> AsyncIterator[bytes]:
    """The body as it comes, decoded, in pieces of 256 KiB at most; a client that waits for leave to send it gets that here,
    past credential and size.

    `start`: of a body that is not encoded, what was read of it already.

    Raises Refusal 413 if it is too large, 415 for an unknown Content-Encoding, 501 for an unknown Transfer-Encoding, 408 if it
    comes too slowly, 400 if it is garbled.
    """
    _check_transfer(request)
    if (request.content_length or 0) > request.client_max_size:
        raise _too_large(request)
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ENCODINGS:
        message = f"Content-Encoding {encoding[:100]!r} is not supported: send {', '.join(ENCODINGS)}."
        raise Refusal(415, "unsupported_encoding", message)
    await _give_leave(request)
    size = len(start)
    if start:
        yield start
    try:
        async for piece in _read(request, encoding):
            if (size := size + len(piece)) > request.client_max_size:
                raise _too_large(request)
            yield piece
    except TimeoutError as error:
        raise _too_slow() from error
    except (web.RequestPayloadError, zlib.error) as error:
        raise _garbled(error) from error
    if (held := request.get(BODY)) is not None:
        held.resize(size)


async def stream_body(request: web.Request, start: bytes) -> AsyncIterator[bytes]:
    """The body as it comes, in the encoding in which it comes, for as long as a body may take; `start` was read already.

    Raises Refusal 408 and 400 as `read_body` does.
    """
    if start:
        yield start
    await _give_leave(request)
    deadline = asyncio.get_running_loop().time() + _BODY_TIMEOUT_SECONDS
    try:
        while not request.content.at_eof():
            async with asyncio.timeout_at(deadline):
                chunk = await request.content.readany()
            yield chunk
    except TimeoutError as error:
        raise _too_slow() from error
    except web.RequestPayloadError as error:
        raise _garbled(error) from error


def _check_transfer(request: web.Request) -> None:
    """A body in any other coding would be read as it is (RFC 9112, section 6.1)."""
    coding = ", ".join(request.headers.getall("Transfer-Encoding", ["chunked"]))
    if coding.strip().lower() != "chunked":
        message = f"Transfer-Encoding {coding[:100]!r} is not supported: send chunked, or Content-Encoding."
        raise Refusal(501, "unsupported_encoding", message)


async def _give_leave(request: web.Request) -> None:
    """To send the body, once, where the client waits for it."""
    waits = request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11
    if waits and not request.get(_HAS_LEAVE, False):
        request[_HAS_LEAVE] = True
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun


async def _read(request: web.Request, encoding: str) -> AsyncIterator[bytes]:
    """Unlike `request.read`, which keeps the body for as long as the request. What a little unpacks to comes in turns with others."""
    decoder = None if encoding == "identity" else zlib.decompressobj(_GZIP_OR_ZLIB)
    content = request.content
    deadline = asyncio.get_running_loop().time() + _BODY_TIMEOUT_SECONDS
    while not content.at_eof():
        if content.is_eof():
            chunk = content.read_nowait()  # all that is left: small bodies have come when they are asked for
        else:
            async with asyncio.timeout_at(deadline):
                if not (chunk := await content.readany()):
                    break
        if decoder is None:
            yield chunk
            continue
        while piece := decoder.decompress(chunk, _PIECE_BYTES):
            yield piece
            chunk = decoder.unconsumed_tail
            await asyncio.sleep(0)
    if decoder is not None and not decoder.eof:
        raise zlib.error("it ends too early")


def _too_slow() -> Refusal:
    return Refusal(408, "request_timeout", "The body did not arrive in time.")


def _garbled(error: Exception) -> Refusal:
    message = f"The body is not what its headers say, such as its chunks or its Content-Encoding: {error}."
    return Refusal(400, "invalid_body", message)


def _too_large(request: web.Request) -> Refusal:
    return Refusal(413, "request_too_large", f"The body is larger than {request.client_max_size} bytes.")


def request_id(request: web.Request) -> str:
    """The client's X-Request-Id if it is short and plain, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
