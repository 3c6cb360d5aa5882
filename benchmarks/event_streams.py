"""Many event streams at once, by bare asyncio protocols: a scripted upstream and its clients cost less than what they measure."""

import asyncio
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import cast
from urllib.parse import urlsplit

import uvloop

EVENTS_PER_SECOND = 20
EVENT_BYTES = 180
_CHUNK = json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": "y"}}]})
EVENT = f'data: {_CHUNK[:-1]}, "pad": "{"z" * (EVENT_BYTES - len(_CHUNK) - 19)}"}}\n\n'.encode()
_DONE = b"data: [DONE]\n\n"
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EMPTY = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
_WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Upstream(asyncio.Protocol):
    """Streams `max_tokens` events, `interval` seconds apart, to whoever posts."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._received = cast(asyncio.Transport, transport), b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self._received = b""
            self._transport.write(_WELL if head.startswith(b"GET /health") else _EMPTY)
            return
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) < int(length.partition(b":")[2]):
            return
        self._received = b""
        asked = json.loads(body)
        self._transport.write(_HEAD)
        self._tick(asked["max_tokens"], asked["interval"], asyncio.get_running_loop().time())

    def _tick(self, num_left: int, interval: float, due: float) -> None:
        if self._transport.is_closing():
            return
        if num_left == 0:
            self._transport.write(_chunked(_DONE) + b"0\r\n\r\n")
            return
        self._transport.write(_CHUNKED_EVENT)
        asyncio.get_running_loop().call_at(due + interval, self._tick, num_left - 1, interval, due + interval)


_CHUNKED_EVENT = _chunked(EVENT)


class Stream(asyncio.Protocol):
    """One client's stream; `times` says when events came, in seconds since the request was sent."""

    def __init__(self, num_events: int, interval: float) -> None:
        self.times: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()
        self._body = {"prompt": "hello", "stream": True, "max_tokens": num_events, "interval": interval}
        self._status = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        body = json.dumps(self._body).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        self._sent_at = time.monotonic()
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        self._transport.write(head % len(body) + body)

    def data_received(self, data: bytes) -> None:
        self._status = self._status or data[:12]
        self.times += [time.monotonic() - self._sent_at] * data.count(b'"pad"')
        if b"[DONE]" in data or not self._status.endswith(b"200"):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def run_upstream(port: int) -> None:
    """A process of its own."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Upstream, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    uvloop.run(serve())


async def one(url: str, num_events: int = 1, interval: float = 0.0) -> Stream:
    """A stream, from its request to its end."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(
        lambda: Stream(num_events, interval), parts.hostname or "", parts.port or 80
    )
    await stream.ended
    return stream


async def many(url: str, num_streams: int, seconds: float, halfway: Callable[[], None] = lambda: None) -> list[float]:
    """Gaps between events of all streams, which begin one after another in the first second; that second is left out.

    `halfway` is called while all of them run. Raises RuntimeError if an event is missing.
    """
    num_events, tasks = int(seconds * EVENTS_PER_SECOND), []
    for _ in range(num_streams):
        tasks.append(asyncio.create_task(one(url, num_events, 1 / EVENTS_PER_SECOND)))
        await asyncio.sleep(1 / num_streams)
    await asyncio.sleep(seconds / 2)
    halfway()
    streams = await asyncio.gather(*tasks)
    if any(len(stream.times) != num_events for stream in streams):
        raise RuntimeError("a stream lost events")
    return [later - earlier for s in streams for earlier, later in pairwise(s.times[EVENTS_PER_SECOND:])]
