"""EventStream: server-sent events to one client, and how a stream begins."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from evenhand_engine.backends.backend import Delta
from evenhand_engine.frontend.service import SETTINGS, WRITES

_MAX_BUFFERED_BYTES = 16384  # of events that a client has not taken; what comes then is coalesced


async def open_events(
    request: web.Request, deltas: AsyncGenerator[tuple[int, Delta], None]
) -> "tuple[EventStream, asyncio.Future[tuple[int, Delta]]]":
    """The stream, as soon as there is something to send in it, and the first delta, perhaps yet to come.

    Nothing is sent before the first request runs, so that whatever refuses it in the queue is an HTTP status; unless it
    waits longer than `--queue-heartbeat`, when the stream begins with comments and a refusal is an event.
    """
    heartbeat = request.app[SETTINGS].queue_heartbeat
    first = asyncio.ensure_future(anext(deltas))
    try:
        if not (await asyncio.wait({first}, timeout=heartbeat))[1]:
            first.result()  # raises what refused it, while that can be a status
            return await EventStream.open(request), first
        events = await EventStream.open(request)
        while not first.done():
            await events.comment("waiting")
            await asyncio.wait({first}, timeout=heartbeat)
        return events, first
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)  # or `deltas` could not be closed: it would be running
        raise


class EventStream:
    """Server-sent events."""

    def __init__(self, request: web.Request, response: web.StreamResponse, writer: AbstractStreamWriter) -> None:
        self._writes = request[WRITES]
        self._response = response
        self._writer = writer

    @classmethod
    async def open(cls, request: web.Request) -> "EventStream":
        """Send status 200 and the headers."""
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
        response = web.StreamResponse(headers=headers)
        writer = await response.prepare(request)
        if writer is None or request.transport is None:
            raise ConnectionResetError("the client is gone")
        request.transport.set_write_buffer_limits(high=_MAX_BUFFERED_BYTES)
        return cls(request, response, writer)

    async def send(self, event: dict[str, Any]) -> None:
        """Waits while the client reads too slowly."""
        await self._write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    async def comment(self, text: str) -> None:
        """A line that clients ignore, so that nothing on the way takes the stream for dead."""
        await self._write(f": {text}\n\n".encode())

    async def send_named(self, event: dict[str, Any]) -> None:
        """With its type as the event's name too."""
        await self._write(f"event: {event['type']}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n")

    async def close(self, end: bytes = b"data: [DONE]\n\n") -> web.StreamResponse:
        if end:
            await self._write(end)
        await self._writes.wait(self._response.write_eof())
        return self._response

    async def _write(self, data: bytes) -> None:
        await self._writes.wait(self._write_and_drain(data))

    async def _write_and_drain(self, data: bytes) -> None:
        """aiohttp waits for the client after 64 KiB only: too much, with a thousand clients that do not read."""
        await self._response.write(data)
        await self._writer.drain()
