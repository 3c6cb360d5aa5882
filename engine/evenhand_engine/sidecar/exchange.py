"""One HTTP exchange with the upstream: the request as it goes there, and the answer as it comes back.

What the upstream answers goes on as it is, errors too; what it fails to answer becomes an OpenAI error, or, where the
answer has begun, an end of the stream that says why.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from evenhand_engine.backends.upstream_connection import UpstreamConnection
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.event_writer import EventWriter
from evenhand_engine.frontend.keys import REQUEST_ID, TENANT_ID, WRITES
from evenhand_engine.openai.errors import error_body, refuse_draining
from evenhand_engine.sidecar.events import EventReader, Usage, usage_of
from evenhand_engine.sidecar.front import FRONT
from evenhand_engine.sidecar.passage import OPENAI_STREAMS, Passage
from evenhand_engine.sidecar.relay import Relay

_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}
_OURS = {"host", "authorization", "content-length", "accept-encoding", "expect", "x-api-key", "x-request-id"}
_ANSWERED_BY_US = {"server", "date", "x-request-id"}
_MAX_HELD_ANSWER = 8 * 2**20  # of an answer that is checked as a whole before it goes on
_SENT_AT_ONCE = 64 * 1024  # of a body
_RETRY_SECONDS = 0.1
_BODILESS = (204, 205, 304)
_ORIGIN = re.compile("^https?://[^/?#]*", re.IGNORECASE)


async def exchange(
    request: web.Request, body: Sequence[bytes] | AsyncIterator[bytes] | None, passage: Passage | None
) -> web.StreamResponse:
    """Send the request and hand its answer on. `body`: in pieces, as far as it is known."""
    upstream = request.app[FRONT].connection
    response = None
    try:
        response = await _send(upstream, request, body)
        if response.status < 200:
            raise upstream_error("it would change the protocol")
        if passage is None or response.status >= 300 or response.status in _BODILESS:
            return await _pass_whole(request, response, passage)
        if response.content_type == "text/event-stream" and not _is_packed(response):
            return await _pass_events(request, response, passage)
        if _is_json(response.content_type) and not _is_packed(response):
            return await _pass_json(request, response, passage)
        if request.path.startswith("/v1/") and response.content_type == "text/html":
            raise upstream_error(f"it answered {response.content_type} instead of JSON")
        return await _pass_whole(request, response, passage)
    except Refusal as refusal:
        if passage is not None:
            passage.fail(refusal, was_sent=refusal.code != "upstream_unavailable")
        raise
    finally:
        if response is not None:
            response.close()  # at once, also where the client has left: that cancels it upstream


async def _send(
    upstream: UpstreamConnection, request: web.Request, body: Sequence[bytes] | AsyncIterator[bytes] | None
) -> aiohttp.ClientResponse:
    """The upstream's answer, as far as its headers. A connection that cannot be made is tried again; nothing else is."""
    is_decoded = not isinstance(body, AsyncIterator)  # what is streamed goes on in the encoding in which it came
    headers = _forwarded(request.headers, _OURS | {"content-encoding"} if is_decoded else _OURS)
    headers["X-Request-Id"] = request[REQUEST_ID]
    headers["Accept-Encoding"] = "identity"
    headers.update(upstream.authorization)
    if isinstance(body, Sequence):
        headers["Content-Length"] = str(sum(map(len, body)))
    deadline = time.monotonic() + upstream.settings.connect_timeout
    while True:
        if upstream.is_closed:
            raise refuse_draining()
        try:
            return await upstream.session.request(
                request.method,
                upstream.url(target_of(request)),
                headers=headers,
                data=_in_pieces(body) if isinstance(body, Sequence) else body,
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            if time.monotonic() > deadline or not is_decoded:
                message = "The engine behind this server cannot be reached."
                raise Refusal(503, "upstream_unavailable", message, retry_after=2.0) from error
            await asyncio.sleep(_RETRY_SECONDS)
        except (aiohttp.SocketTimeoutError, TimeoutError) as error:
            raise upstream_timeout() from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error.__cause__, Refusal):  # of a body that did not come, while it was sent
                raise error.__cause__ from error
            raise _broken_off(upstream, f"it did not answer in HTTP ({type(error).__name__})") from error


def target_of(request: web.Request) -> str:
    """Path and query as the client wrote them, also behind an origin, which a server has to take (RFC 9112, section 3.2.2)."""
    return _ORIGIN.sub("", request.raw_path)


def _in_pieces(body: Sequence[bytes]) -> bytes | AsyncIterator[bytes]:
    """What is small in one go, the rest by and by: a large piece would hold the loop while it is copied."""
    return b"".join(body) if sum(map(len, body)) <= _SENT_AT_ONCE else _pieces(body)


async def _pieces(body: Sequence[bytes]) -> AsyncIterator[bytes]:
    """As large as is sent at once, and in turns with others: an upstream that reads at once would never make us wait."""
    held, size = list[bytes](), 0
    for piece in body:
        for start in range(0, len(piece), _SENT_AT_ONCE):
            held.append(piece[start : start + _SENT_AT_ONCE])
            size += len(held[-1])
            if size >= _SENT_AT_ONCE:
                yield b"".join(held)
                held, size = [], 0
                await asyncio.sleep(0)
    yield b"".join(held)


def _forwarded(headers: CIMultiDictProxy[str], ours: set[str]) -> CIMultiDict[str]:
    """Headers that go on: those that are about one connection stay on it, and ours are set by us."""
    listed = {name.strip().lower() for line in headers.getall("Connection", ()) for name in line.split(",")}
    stay = _HOP_BY_HOP | ours | listed
    return CIMultiDict([(name, value) for name, value in headers.items() if name.lower() not in stay])


def _answered(request: web.Request, upstream: aiohttp.ClientResponse) -> CIMultiDict[str]:
    """An answer's headers as they go on. Where it leads the client elsewhere at the upstream, that is at this server."""
    headers = _forwarded(upstream.headers, _ANSWERED_BY_US)
    if (location := headers.get("Location")) is not None:
        headers["Location"] = request.app[FRONT].connection.without_origin(location)
    return headers


async def _pass_whole(
    request: web.Request, upstream: aiohttp.ClientResponse, passage: Passage | None, start: bytes = b""
) -> web.StreamResponse:
    """Any answer, as it comes; `start` came already."""
    if upstream.status >= 500 and upstream.content_type == "text/html":  # a proxy's page in between
        raise Refusal(upstream.status, "upstream_error", f"The engine answered {upstream.status}.", retry_after=1.0)
    response = web.StreamResponse(status=upstream.status, headers=_answered(request, upstream))
    writes = request[WRITES]
    has_body = request.method != "HEAD" and upstream.status not in _BODILESS
    await response.prepare(request)
    num_bytes = len(start)
    try:
        if has_body:
            await writes.wait(response.write(start))
            async for chunk in _chunks(request, upstream):
                num_bytes += len(chunk)
                await writes.wait(response.write(chunk))
    except Refusal as failure:
        if passage is not None:
            passage.fail(failure, was_sent=True)
        if request.transport is not None:
            request.transport.abort()  # the client must see that it is not whole
        return response
    if passage is not None:
        is_text = _is_packed(upstream) or upstream.content_type.endswith("json")
        if is_text and has_body and upstream.status < 300:
            passage.take_bytes(num_bytes)
        passage.finish(upstream.status)
    await writes.wait(response.write_eof())
    return response


async def _pass_json(request: web.Request, upstream: aiohttp.ClientResponse, passage: Passage) -> web.StreamResponse:
    """An answer that comes as a whole at its end: held until it is known to be one."""
    held, size = list[bytes](), 0
    async for chunk in _chunks(request, upstream):
        held.append(chunk)
        if (size := size + len(chunk)) > _MAX_HELD_ANSWER:
            return await _pass_whole(request, upstream, passage, b"".join(held))
    answer = b"".join(held)
    usage = await request.app[FRONT].compute(request[TENANT_ID], size, lambda: _usage_of_json(answer))
    if not passage.take_usage(usage):
        passage.take_bytes(size)
    passage.finish(upstream.status)
    headers = _answered(request, upstream)
    headers["Content-Length"] = str(len(answer))
    return web.Response(status=upstream.status, body=answer, headers=headers)


def _usage_of_json(answer: bytes) -> Usage | None:
    try:
        msgspec.json.decode(answer, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise upstream_error("its answer is not JSON") from error
    return usage_of(answer)


def _is_packed(response: aiohttp.ClientResponse) -> bool:
    """Whether what is in the answer cannot be read here."""
    return response.headers.get("Content-Encoding", "identity").strip().lower() != "identity"


def _is_json(content_type: str) -> bool:
    """Not where each line is an object of its own."""
    return content_type == "application/json" or content_type.endswith("+json")


async def _pass_events(request: web.Request, upstream: aiohttp.ClientResponse, passage: Passage) -> web.StreamResponse:
    """An event stream, event by event as they come."""
    headers = _answered(request, upstream)
    headers.pop("Content-Length", None)  # an event may be left out, or come in addition
    headers["X-Accel-Buffering"] = "no"
    response = web.StreamResponse(status=upstream.status, headers=headers)
    await response.prepare(request)
    writes, reader = request[WRITES], EventReader(hides_usage=passage.hides_usage)
    send = EventWriter(request, response)
    failure: Refusal | None = None
    feed, generated = reader.feed, passage.ticket.generated

    def take(chunk: bytes) -> bool:
        nonlocal failure
        num_before = reader.num_events
        out = feed(chunk)
        if num_events := reader.num_events - num_before:
            failure = generated(num_events)  # before somebody who does not read stops us
        return send(out) and failure is None

    def take_framed(data: bytes) -> bool | None:
        nonlocal failure
        if not send.is_chunked or not reader.passes(data):
            return None
        failure = generated(1)
        return send.pass_on(data) and failure is None

    try:
        relay = Relay(upstream, take, request.app[FRONT].connection.settings.idle_timeout, take_framed)
        while failure is None and not relay.has_ended:
            await relay.run()
            await writes.wait(send.drain())
    except TimeoutError:
        failure = upstream_timeout()
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, ConnectionResetError) and send.is_closed:
            raise  # it is the client who has gone
        failure = _broken_off(request.app[FRONT].connection)
    out = reader.flush()
    passage.take_usage(reader.usage)
    if failure is None and not reader.is_done and request.path in OPENAI_STREAMS:
        failure = upstream_error("it ended the stream before it was complete")
    if failure is None:
        passage.finish(upstream.status)
    else:
        passage.fail(failure, was_sent=True)
        request.app[DOOR].count_refusal(passage.tenant_id, failure.code)
        out += b"\n\ndata: " + msgspec.json.encode(error_body(failure)) + b"\n\n"
    await writes.wait(response.write_eof(out))
    return response


async def _chunks(request: web.Request, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The answer's bytes as they come; raises Refusal where they end before the answer does."""
    try:
        async for chunk in upstream.content.iter_any():
            yield chunk
    except TimeoutError as error:
        raise upstream_timeout() from error
    except (aiohttp.ClientError, OSError) as error:
        raise _broken_off(request.app[FRONT].connection) from error


def _broken_off(upstream: UpstreamConnection, what: str = "its connection ended before its answer did") -> Refusal:
    """Whose fault it is that no more comes: ours where a drain has no more time."""
    return refuse_draining() if upstream.is_closed else upstream_error(what)


def upstream_error(what: str) -> Refusal:
    return Refusal(502, "upstream_error", f"The engine behind this server failed: {what}.", retry_after=1.0)


def upstream_timeout() -> Refusal:
    return Refusal(504, "upstream_timeout", "The engine behind this server did not answer in time.", retry_after=1.0)
