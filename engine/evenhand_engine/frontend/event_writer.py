"""EventWriter: writes to one client in the call that has something for it, and tells when the client does not keep up."""

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import web

_MAX_BUFFERED_BYTES = 16 * 1024  # for a client that does not read; what comes then is kept elsewhere, or not taken

_encode = msgspec.json.Encoder().encode


class EventWriter:
    """Without a coroutine for each write, which costs more than the write.

    Args:
        response: to `request`; prepared, and nothing else is written until this is done.

    Attributes:
        is_chunked: whether the answer goes in chunks: not to a client of HTTP/1.0.
    """

    __slots__ = (
        "_protocol",
        "_request",
        "is_chunked",
    )

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._protocol = request.protocol
        self.is_chunked = response.headers.get("Transfer-Encoding") == "chunked"
        if request.transport is not None:
            request.transport.set_write_buffer_limits(high=_MAX_BUFFERED_BYTES)

    @property
    def is_closed(self) -> bool:
        """Whether the client has gone."""
        transport = self._protocol.transport
        return transport is None or transport.is_closing()

    @property
    def keeps_up(self) -> bool:
        """Whether the client reads as fast as it is written to."""
        return not self._protocol.writing_paused

    def __call__(self, data: bytes) -> bool:
        """Send; returns whether the client keeps up. Raises ConnectionResetError if it has gone."""
        protocol = self._protocol
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        if data:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)
        return not protocol.writing_paused

    def pass_on(self, chunks: bytes) -> bool:
        """The same with what is framed already, to a client whose answer is chunked."""
        protocol = self._protocol
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        transport.write(chunks)
        return not (transport.get_write_buffer_size() and protocol.writing_paused)

    def between(self, before: bytes, after: bytes, full: Callable[[], None]) -> Callable[[str], bool] | None:
        """What writes texts between these bytes, see `TextWriter`; None if the client's protocol does not let it."""
        transport = self._protocol.transport
        if transport is None or not self.is_chunked:
            return None
        return TextWriter(self._protocol, transport, before, after, full).write

    async def drain(self) -> None:
        """Wait until the client keeps up again."""
        await self._request.writer.drain()


class TextWriter:
    """Writes events that differ by one text. Called for every token of a stream, so it is one call and touches few objects.

    Args:
        transport: of `protocol`.
        before, after: what stands around the text, which is written as a JSON string.
        full: called when the client does not keep up.
    """

    __slots__ = (
        "_after",
        "_before",
        "_full",
        "_num_around",
        "_protocol",
        "_transport",
    )

    def __init__(
        self,
        protocol: web.RequestHandler,
        transport: asyncio.Transport,
        before: bytes,
        after: bytes,
        full: Callable[[], None],
    ) -> None:
        self._protocol = protocol
        self._transport = transport
        self._before = before
        self._after = after
        self._num_around = len(before) + len(after)
        self._full = full

    def write(self, text: str) -> bool:
        """Send; returns False, and does nothing, if the client has gone."""
        transport = self._transport
        if transport.is_closing():
            return False
        data = _encode(text)
        transport.write(b"%x\r\n%b%b%b\r\n" % (self._num_around + len(data), self._before, data, self._after))
        if transport.get_write_buffer_size() and self._protocol.writing_paused:
            self._full()
        return True
