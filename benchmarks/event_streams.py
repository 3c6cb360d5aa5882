"""Many event streams at once: a scripted upstream and its clients, on raw sockets, so that they cost less than what they measure.

The upstream sends what is due in the order in which it is due, to the millisecond; the clients look at what came every other
millisecond and keep the kernel's time of it (arrivals.py), so nobody's core is taken to wake them for each event.
"""

import functools
import heapq
import itertools
import json
import select
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from arrivals import Client, Clients

EVENTS_PER_SECOND = 20
EVENT_BYTES = 180
_CHUNK = json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": "y"}}]})
_EVENT = f'data: {_CHUNK[:-1]}, "pad": "{"z" * (EVENT_BYTES - len(_CHUNK) - 19)}"}}\n\n'.encode()
_DONE = b"data: [DONE]\n\n"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EMPTY = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
_WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
_LOOK_SECONDS = 0.002


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_CHUNKED_EVENT, _END = _chunked(_EVENT), _chunked(_DONE) + b"0\r\n\r\n"


class _Upstream:
    """Streams `max_tokens` events, `interval` seconds apart, to whoever posts."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._connections: dict[int, socket.socket] = {}
        self._received: dict[socket.socket, bytes] = {}
        self._due: list[tuple[float, int, socket.socket, int, float]] = []  # when, whose, events left, interval
        self._numbers = itertools.count()

    def run(self) -> None:
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for descriptor, _ in self._epoll.poll(wait):
                if descriptor == self._listener.fileno():
                    self._accept()
                else:
                    self._receive(self._connections[descriptor])
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._send_next()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._connections[connection.fileno()] = connection
        self._received[connection] = b""
        self._epoll.register(connection, select.EPOLLIN)

    def _close(self, connection: socket.socket) -> None:
        self._epoll.unregister(connection)
        del self._connections[connection.fileno()], self._received[connection]
        connection.close()

    def _receive(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            return self._close(connection)
        self._received[connection] += data
        head, found, body = self._received[connection].partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            connection.send(_WELL if head.startswith(b"GET /health") else _EMPTY)
        else:
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            if len(body) < int(length.partition(b":")[2]):
                return
            asked = json.loads(body)
            connection.send(_HEAD)
            self._call_at(time.monotonic(), connection, asked["max_tokens"], asked["interval"])
        self._received[connection] = b""

    def _call_at(self, due: float, connection: socket.socket, num_left: int, interval: float) -> None:
        heapq.heappush(self._due, (due, next(self._numbers), connection, num_left, interval))

    def _send_next(self) -> None:
        due, _, connection, num_left, interval = heapq.heappop(self._due)
        try:
            connection.send(_CHUNKED_EVENT if num_left else _END)
        except OSError:  # the client is gone, and its socket perhaps closed
            return
        if num_left:
            self._call_at(due + interval, connection, num_left - 1, interval)


def run_upstream(port: int) -> None:
    """A process of its own."""
    _Upstream(port).run()


@functools.cache
def _request(num_events: int, interval: float) -> bytes:
    body = json.dumps({"prompt": "hello", "stream": True, "max_tokens": num_events, "interval": interval}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def _ask(url: str, num_events: int, interval: float) -> Client:
    parts = urlsplit(url)
    return Client((parts.hostname or "", parts.port or 80), _request(num_events, interval))


def _times(client: Client) -> list[float]:
    """When each event came."""
    return [now for now, event in client.events() if b'"pad"' in event]


def time_to_first_event(url: str) -> float:
    """Seconds, of a lone request for one event."""
    client = _ask(url, 1, 0.0)
    while client.read():
        pass
    client.socket.close()
    return _times(client)[0] - client.sent_at


def gaps(url: str, num_streams: int, seconds: float, halfway: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds between events of all streams, which begin one after another in the first second; that second is left out.

    `halfway` is called while all of them run. Raises RuntimeError if an event is missing.
    """
    num_events, clients, reading = int(seconds * EVENTS_PER_SECOND), list[Client](), Clients()
    began_at = time.monotonic()
    looks_at = began_at + 1 + seconds / 2
    while len(clients) < num_streams or reading.num_open:
        now = time.monotonic()
        while len(clients) < min(num_streams, (now - began_at) * num_streams):
            clients.append(_ask(url, num_events, 1 / EVENTS_PER_SECOND))
            reading.add(clients[-1])
        if now >= looks_at:
            looks_at = float("inf")
            halfway()
        time.sleep(_LOOK_SECONDS)
        reading.read()
    reading.close()
    times = [_times(client) for client in clients]
    if any(len(each) != num_events for each in times):
        raise RuntimeError("a stream lost events")
    return [later - earlier for each in times for earlier, later in itertools.pairwise(each[EVENTS_PER_SECOND:])]
