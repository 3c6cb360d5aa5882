"""Channel: typed messages between two processes of one server, over a socket, in the event loop.

Neither side waits for the other, so one that stands still is given up: what it has not read is bounded.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

M = TypeVar("M")

_LENGTH = struct.Struct("=I")
_MAX_UNREAD_BYTES = 8 * 2**20  # beside the newest message, which may be a config of any size


class Channel(asyncio.Protocol, Generic[M]):
    """Each message is its length in four bytes, then MessagePack.

    Args:
        kind: of the messages that come.
        receive: called with each of them, in order.
        lost: called once, when the other side is gone, is given up, or has sent what is no message.
    """

    def __init__(self, kind: Any, receive: Callable[[M], None], lost: Callable[[], None]) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._receive = receive
        self._lost = lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    async def open(self, end: socket.socket) -> None:
        """Use `end`, which is then this channel's."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    def send(self, message: msgspec.Struct) -> None:
        """Messages arrive in the order in which they are sent; to a side that is gone, none does."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            return self.give_up()
        data = self._encoder.encode(message)
        self._transport.write(_LENGTH.pack(len(data)) + data)

    @property
    def is_closed(self) -> bool:
        return self._transport is None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def give_up(self) -> None:
        """The other side stands still: end the channel, without what it has not read."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not registered as one

    def data_received(self, data: bytes) -> None:
        buffer, start = self._buffer, 0
        buffer += data
        while len(buffer) - start >= _LENGTH.size:
            begin = start + _LENGTH.size
            end = begin + _LENGTH.unpack_from(buffer, start)[0]
            if len(buffer) < end:
                break
            self._receive(self._decoder.decode(buffer[begin:end]))
            start = end
        del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lost()
