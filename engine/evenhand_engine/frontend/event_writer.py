"""EventWriter: writes to one client in the call that has something for it, and tells when the client does not keep up."""

from aiohttp import web

_MAX_BUFFERED_BYTES = 16 * 1024  # for a client that does not read; what comes then is kept elsewhere, or not taken


class EventWriter:
    """Without a coroutine for each write, which costs more than the write.

    Args:
        response: to `request`; prepared, and nothing else is written until this is done.
    """

    __slots__ = (
        "_is_chunked",
        "_protocol",
        "_request",
    )

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._protocol = request.protocol
        self._is_chunked = response.headers.get("Transfer-Encoding") == "chunked"  # not to a client of HTTP/1.0
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
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        return not protocol.writing_paused

    async def drain(self) -> None:
        """Wait until the client keeps up again."""
        await self._request.writer.drain()
