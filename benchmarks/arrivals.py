"""Clients of event streams that cost little beside what they measure: raw sockets, one epoll, and the kernel's own time stamps.

What came is kept and read afterwards. When it came is when the kernel had it (Linux), however late a client looks at it.
"""

import select
import socket
import struct
import time
from collections.abc import Iterator

_SO_TIMESTAMPNS = 35  # Linux's, which Python has no name for; the time of a message's arrival comes with it
_TIME = struct.Struct("qq")
_ROOM_FOR_TIME = socket.CMSG_SPACE(_TIME.size)


class Client:
    """One client: asks, then keeps what comes.

    Args:
        address: host and port.
        request: as it goes over the wire.

    Attributes:
        sent_at: by the wall clock, as all times here.
    """

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.sent_at = time.time()
        self.socket.sendall(request)
        self._parts: list[tuple[float, bytes]] = []

    def read(self) -> bool:
        """What has come; returns whether more will."""
        data, told, _, _ = self.socket.recvmsg(65536, _ROOM_FOR_TIME)
        seconds, nanoseconds = _TIME.unpack(told[0][2]) if told else (time.time(), 0)  # told of all but the first
        self._parts.append((seconds + 1e-9 * nanoseconds, data))
        return bool(data) and b"[DONE]" not in data[-32:]

    def events(self) -> Iterator[tuple[float, bytes]]:
        """Each event that came whole, and when."""
        tail = b""
        for now, data in self._parts:
            *events, tail = (tail + data).split(b"\n\n")
            for event in events:
                yield now, event


class Clients:
    """Those that are still to be read.

    Attributes:
        num_open: whose answers have not ended.
    """

    def __init__(self) -> None:
        self.num_open = 0
        self._epoll = select.epoll()
        self._clients: dict[int, Client] = {}

    def add(self, client: Client) -> None:
        self._clients[client.socket.fileno()] = client
        self._epoll.register(client.socket.fileno(), select.EPOLLIN)
        self.num_open += 1

    def read(self) -> None:
        """What has come for any; never sleeps: to wake a process of the same machine costs a server as much as an event does, and
        it has no such clients."""
        for descriptor, _ in self._epoll.poll(0):
            if not self._clients[descriptor].read():
                self._epoll.unregister(descriptor)
                self.num_open -= 1

    def close(self) -> None:
        self._epoll.close()
        for client in self._clients.values():
            client.socket.close()
