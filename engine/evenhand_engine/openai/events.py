"""Server-sent events to one client: how a stream begins, goes on and ends."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
from aiohttp import web

from evenhand_engine.backends.backend import Delta
from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.event_writer import EventWriter
from evenhand_engine.frontend.keys import SETTINGS, TENANT_ID, WRITES
from evenhand_engine.openai.deltas import Deltas, Take
from evenhand_engine.openai.errors import refuse_dead_engine

Event = dict[str, Any]

First = asyncio.Future[tuple[int, Delta]]
"""The first delta of an answer, perhaps yet to come."""

_encode = msgspec.json.Encoder().encode


def data_event(event: Event) -> bytes:
    return b"data: %b\n\n" % _encode(event)


def named_events(events: Iterable[Event]) -> bytes:
    """Each with its type as its name too."""
    return b"".join([b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encode(event)) for event in events])


class EventStream:
    """What is written to one client, at its pace. Writing raises ConnectionResetError if it has gone.

    Attributes:
        put: writes at once; for a `take` of `hand_on`, which returns what this does.
    """

    __slots__ = (
        "_response",
        "_writes",
        "put",
    )

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._writes = request[WRITES]
        self._response = response
        self.put = EventWriter(request, response)

    @classmethod
    async def open(cls, request: web.Request) -> "EventStream":
        """Send status 200 and the headers."""
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        return cls(request, response)

    async def write(self, events: bytes) -> None:
        """Waits while the client reads too slowly."""
        if not self.put(events):
            await self._drain()

    async def hand_on(self, deltas: Deltas, take: Take) -> None:
        """Give each delta to `take`, which puts what it makes of it, in the call that brings it while the client keeps up."""
        while await deltas.hand_on(take):
            await self._drain()

    async def close(self, end: bytes) -> web.StreamResponse:
        """In one write: to send the end of the body by itself would cost as much as a token."""
        await self._writes.wait(self._response.write_eof(end))
        return self._response

    async def _drain(self) -> None:
        await self._writes.wait(self.put.drain())


async def answer_in_events(
    request: web.Request,
    deltas: Deltas,
    write: Callable[[EventStream, First], Awaitable[None]],
    fail: Callable[[Refusal], bytes],
    *,
    end: bytes = b"",
) -> web.StreamResponse:
    """A whole answer.

    Args:
        write: everything but the end.
        fail: the event that tells why there is no more.
        end: what stands last, also after that.
    """
    events, first = await _open(request, deltas)
    door = request.app[DOOR]
    refused = None
    try:
        await write(events, first)
    except Refusal as refusal:
        refused = refusal
    except EngineDeadError:
        refused = refuse_dead_engine(draining=door.draining)
    if refused is not None:
        door.count_refusal(request[TENANT_ID], refused.code)
        await events.write(fail(refused))
    return await events.close(end)


async def _open(request: web.Request, deltas: Deltas) -> tuple[EventStream, First]:
    """The stream, as soon as there is something to send in it, and the first delta.

    Nothing is sent before the first request runs, so that whatever refuses it in the queue is an HTTP status; unless it
    waits longer than `--queue-heartbeat`, when the stream begins with comments and a refusal is an event.
    """
    heartbeat = request.app[SETTINGS].queue_heartbeat
    first: First = asyncio.ensure_future(anext(deltas))
    try:
        if not (await asyncio.wait({first}, timeout=heartbeat))[1]:
            first.result()  # raises what refused it, while that can be a status
            return await EventStream.open(request), first
        events = await EventStream.open(request)
        while not first.done():
            await events.write(b": waiting\n\n")  # which clients ignore, so that nothing on the way takes it for dead
            await asyncio.wait({first}, timeout=heartbeat)
        return events, first
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        raise
