"""Relay: an upstream's bytes handed on in the very call that brings them, while the client keeps up.

To wake a task for each event costs more than the event does. So while a stream runs, a Relay stands between the upstream's
transport and aiohttp's protocol, which goes on to parse: what it has parsed is taken from it at once. Of whole chunks, between
which its parser stands, that need not even be told: it will find the end of the body where it would have found one more chunk.
"""

import asyncio
from collections.abc import Callable

import aiohttp

from evenhand_engine.sidecar.chunks import whole_chunks

_MAX_CERTAIN_BYTES = 64 * 1024  # a read so short makes aiohttp's parser pause at no chunk of it


class Relay(asyncio.Protocol):
    """Reads one answer that nobody else reads.

    Args:
        response: of the upstream.
        take: is given what came, and says whether it takes more; what it raises ends the relay.
        take_framed: is given before that what came between two chunks, their framing included, and may leave it by None.
        idle_timeout: seconds without a byte after which the upstream has failed.
    """

    __slots__ = (
        "_content",
        "_done",
        "_heard_at",
        "_idle_timeout",
        "_inner",
        "_is_between_chunks",
        "_loop",
        "_take",
        "_take_framed",
        "_timer",
        "_transport",
    )

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        take: Callable[[bytes], bool],
        idle_timeout: float,
        take_framed: Callable[[bytes], bool | None] = lambda data: None,
    ) -> None:
        self._content = response.content
        self._take = take
        self._take_framed = take_framed
        self._idle_timeout = idle_timeout
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._heard_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._is_between_chunks = False  # aiohttp's parser, for certain
        connection = response.connection  # None: all of it has come, and the connection is somebody else's by now
        self._inner = None if connection is None else connection.protocol
        self._transport = None if connection is None else connection.transport
        if self._inner is not None:
            self._inner.read_timeout = None  # aiohttp sets its own anew for each event

    @property
    def has_ended(self) -> bool:
        """Whether all of the answer came and was taken."""
        return self._content.at_eof()

    async def run(self) -> None:
        """Hand on until the answer ends or `take` wants no more; may be called again after that.

        Raises what `take` raises, TimeoutError, and aiohttp's errors where the connection ends before the answer does.
        """
        self._done = self._loop.create_future()
        self._heard_at = self._loop.time()  # whoever took no more was slow, not the upstream
        if self._transport is not None and not self._content.is_eof():
            self._transport.set_protocol(self)
            self._check()
        self._hand_on()  # what has come meanwhile
        try:
            await self._done
        finally:
            self._stop()

    def _hand_on(self) -> None:
        """Take what aiohttp has parsed."""
        if self._done.done():
            return
        try:
            takes_more = True
            while takes_more and (chunk := self._content.read_nowait()):
                takes_more = self._take(chunk)
            if self._content.is_eof() or not takes_more:
                self._end(None)
            elif self._transport is None or self._transport.is_closing():
                raise aiohttp.ClientPayloadError("the connection ended before the answer did")
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._stop()
        if self._done.done():  # its task is being cancelled
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    def _stop(self) -> None:
        """Give the connection back to aiohttp, at once: it may be in its pool already."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        self._is_between_chunks = False
        if self._transport is not None and self._inner is not None:
            self._transport.set_protocol(self._inner)

    def _check(self) -> None:
        left = self._heard_at + self._idle_timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        elif not self._done.done():
            self._end(TimeoutError())

    def _stands_between_chunks(self, data: bytes) -> bool:
        """Whether aiohttp's parser does, now that it was given `data` last: the last that it has parsed is a chunk's end, and what
        came ends as no part of the next chunk's first line can. So it is seen after an event, whose last byte ends a line."""
        ends = getattr(self._content, "_http_chunk_splits", None)  # of the chunks; another aiohttp may have none
        if not ends or ends[-1] != self._content.total_bytes:
            return False
        return data.endswith(b"\n\r\n") and len(data) <= _MAX_CERTAIN_BYTES

    # -- asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self._is_between_chunks:
            try:
                takes_more = self._take_framed(data)
                if takes_more is None and (chunk := whole_chunks(data)) is not None:
                    takes_more = self._take(chunk)
            except Exception as error:
                return self._end(error)
            if takes_more is not None:
                return None if takes_more else self._end(None)
        assert self._inner is not None
        self._inner.data_received(data)
        self._is_between_chunks = self._stands_between_chunks(data)
        self._hand_on()

    def eof_received(self) -> None:
        assert self._inner is not None
        self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._inner is not None
        self._inner.connection_lost(exc)
        self._transport = None
        self._hand_on()

    def pause_writing(self) -> None:
        assert self._inner is not None
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        assert self._inner is not None
        self._inner.resume_writing()
