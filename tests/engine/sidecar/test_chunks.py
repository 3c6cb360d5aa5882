"""What is told of chunks without a parser is what a parser tells; and aiohttp's, which is not told of them, misses nothing."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import aiohttp
import pytest

from evenhand_engine.sidecar.chunks import whole_chunks
from evenhand_engine.sidecar.relay import Relay

from .conftest import DONE, WAIT_SECONDS, event

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def framed(data: bytes, size_line: bytes = b"%x") -> bytes:
    return size_line % len(data) + b"\r\n" + data + b"\r\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (framed(event()), event()),
        (framed(event("1")) + framed(event("\n2\r\n\r\n")) + framed(b"x"), event("1") + event("\n2\r\n\r\n") + b"x"),
        (framed(b"x" * 171, b"%X"), b"x" * 171),
        (framed(b"\r\n"), b"\r\n"),
        (b"1\r\n0\r\n", b"0"),
    ],
)
def test_whole_chunks_are_what_they_hold(data: bytes, expected: bytes) -> None:
    assert whole_chunks(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        END,
        framed(event()) + END,
        framed(event())[:-1],
        framed(event())[1:],
        framed(event()) + b"5",
        framed(event()) + b"5\r\nab",
        b"5\r\nhello",
        b"5\r\nhello\r",
        b"5\r\nhellox\r\n",
        b"5\r\nhelloxy",
        b"4\r\nhello\r\n",
        b"5;name=value\r\nhello\r\n",
        b"5\nhello\r\n",
        b"hello",
        b"\r\nhello\r\n",
        *(sign + b"\r\nhello\r\n" for sign in (b"+5", b"-5", b" 5", b"5 ", b"05", b"0x5", b"0_5", b"5_", b"")),
        *(b"%b\r\n%b\r\n" % (size, b"x" * 0x55) for size in (b"5_5", b"+55", b"0x55", b"\x0b55", b"\xb255")),
    ],
)
def test_whatever_else_is_left_to_a_parser(data: bytes) -> None:
    assert whole_chunks(data) is None


class Reading:
    """A relay that reads an answer, of which the test brings every byte after the headers as if it had come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        connection = response.connection
        assert connection is not None and connection.protocol is not None
        self.taken = b""
        self.parsed: list[bytes] = []  # what aiohttp was given
        self.failure: Exception | None = None  # raised where something is taken
        self.takes_more = True
        self.protocol, self._parse = connection.protocol, connection.protocol.data_received
        self.protocol.data_received = self._note  # type: ignore[method-assign]
        self.relay = Relay(response, self._take, WAIT_SECONDS)

    def _note(self, data: bytes) -> None:
        if data:  # else it goes on with what it has
            self.parsed.append(data)
        self._parse(data)

    def _take(self, chunk: bytes) -> bool:
        self.taken += chunk
        if self.failure is not None:
            raise self.failure
        return self.takes_more

    async def begin(self) -> asyncio.Task[None]:
        run = asyncio.create_task(self.relay.run())
        await asyncio.sleep(0)
        return run

    async def read(self, *pieces: bytes) -> None:
        """All of an answer."""
        run = await self.begin()
        for piece in pieces:
            self.relay.data_received(piece)
        await run


class Upstream:
    """Sends headers of answers, and counts its connections."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.num_connections = 0
        self.tasks: list[Any] = []
        self.url = ""
        self._session = session

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.tasks.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(HEAD)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    @contextlib.asynccontextmanager
    async def answer(self) -> AsyncIterator[Reading]:
        async with self._session.get(self.url) as response:
            yield Reading(response)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with aiohttp.ClientSession() as session:
        upstream = Upstream(session)
        async with await asyncio.start_server(upstream.serve, "127.0.0.1", 0) as server, asyncio.timeout(WAIT_SECONDS):
            upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            yield upstream
            await session.close()
            await asyncio.gather(*upstream.tasks)


async def test_aiohttp_is_given_the_first_event_and_the_end(upstream: Upstream) -> None:
    first, others = framed(event("1")), [framed(event("2")), framed(event("3")) + framed(event("4"))]
    async with upstream.answer() as reading:
        await reading.read(first, *others, END)
    assert reading.taken == b"".join(map(event, "1234"))
    assert reading.parsed == [first, END]


async def test_answers_are_whole_however_they_come(upstream: Upstream) -> None:
    """And their connection can be used again, as it can be where aiohttp has read all of them."""
    for seed in range(40):
        rng = random.Random(seed)
        parts = [
            rng.choice([event(), event("é" * 90), DONE, b"x\n", framed(b"y\n")]) for _ in range(rng.randint(1, 20))
        ]
        wire, cuts = b"", []
        for part in parts:
            wire += framed(part, rng.choice([b"%x", b"%X", b"0%x", b"%x;name"]) if rng.random() < 0.2 else b"%x")
            cuts.append(len(wire))
        wire += END
        places = {*rng.sample(cuts, rng.randint(0, len(cuts))), *rng.choices(range(1, len(wire)), k=rng.randint(0, 4))}
        edges = [0, *sorted(places), len(wire)]
        async with upstream.answer() as reading:
            await reading.read(*(wire[start:end] for start, end in pairwise(edges)))
        assert reading.taken == b"".join(parts), seed
        assert reading.relay.has_ended
    assert upstream.num_connections == 1


async def test_what_looks_like_a_chunk_inside_of_one_is_passed_on_as_it_is(upstream: Upstream) -> None:
    """The read before it ends as it would after an event, or where a chunk's first line has begun."""
    inside = event() + b"\r\n" + framed(b"y") + framed(b"z")
    cut = framed(inside).index(framed(b"y"))
    async with upstream.answer() as reading:
        await reading.read(framed(event()), framed(inside)[:cut], framed(b"y"), framed(b"z"), b"\r\n", END)
    assert reading.taken == event() + inside
    long = b"abc\r\n" + b"x" * 14
    assert framed(long).startswith(b"13\r\n")
    async with upstream.answer() as reading:
        await reading.read(framed(event()) + b"1", b"3\r\nabc\r\n", b"x" * 14 + b"\r\n", END)
    assert reading.taken == event() + long


async def test_whoever_takes_no_more_gets_the_rest_later(upstream: Upstream) -> None:
    """What comes meanwhile, as if for aiohttp, ends amid a chunk, and is more than its parser takes in at once."""
    rest, half = framed(event("4"))[:-5], framed(event("4"))[-5:]
    async with upstream.answer() as reading:
        run = await reading.begin()
        reading.relay.data_received(framed(event("1")))
        reading.takes_more = False
        reading.relay.data_received(framed(event("2")))
        await run
        reading.protocol.data_received(framed(b"3") * 20_000 + rest)
        reading.takes_more = True
        run = await reading.begin()
        assert reading.taken == event("1") + event("2") + b"3" * 20_000 + event("4")[:-3]
        reading.relay.data_received(half)
        reading.relay.data_received(framed(event("5")) + END)
        await run
    assert reading.taken == event("1") + event("2") + b"3" * 20_000 + event("4") + event("5")
    assert reading.relay.has_ended


async def test_a_chunk_of_which_half_came_meanwhile_is_no_new_one(upstream: Upstream) -> None:
    inside = event() + b"\r\n" + framed(b"y")
    async with upstream.answer() as reading:
        run = await reading.begin()
        reading.relay.data_received(framed(event()))
        reading.takes_more = False
        reading.relay.data_received(framed(event()))
        await run
        reading.protocol.data_received(framed(inside)[: framed(inside).index(framed(b"y"))])
        reading.takes_more = True
        await reading.read(framed(b"y"), b"\r\n" + END)
    assert reading.taken == event() * 2 + inside


async def test_what_fails_between_chunks_is_raised(upstream: Upstream) -> None:
    async with upstream.answer() as reading:
        with pytest.raises(aiohttp.ClientPayloadError):
            await reading.read(framed(event()), framed(event()), b"no chunk\r\n")
    assert reading.taken == event() * 2
    async with upstream.answer() as reading:
        run = await reading.begin()
        reading.relay.data_received(framed(event()))
        reading.failure = ConnectionResetError()
        reading.relay.data_received(framed(event()))
        with pytest.raises(ConnectionResetError):
            await run
    async with upstream.answer() as reading:
        run = await reading.begin()
        reading.relay.data_received(framed(event()))
        run.cancel()
        reading.failure = ConnectionResetError()
        reading.relay.data_received(framed(event()))  # before its task has heard of that
        with pytest.raises(asyncio.CancelledError):
            await run
