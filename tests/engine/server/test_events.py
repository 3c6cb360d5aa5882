"""A stream is written at its client's pace: a write returns when the client keeps up again, and not before."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from evenhand_engine.frontend.keys import WRITES
from evenhand_engine.frontend.write_timeout import WriteTimeout
from evenhand_engine.openai.events import EventStream, data_event


class SlowClient:
    """Stands for the request of a client that takes what it is sent when `reads` is set."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.reads = asyncio.Event()
        self.transport: Any = SimpleNamespace(
            is_closing=lambda: self.is_gone,
            write=self.written.append,
            set_write_buffer_limits=lambda high: None,
            get_write_buffer_size=lambda: 0 if self.reads.is_set() else sum(map(len, self.written)),
        )
        self.is_gone = False
        self.writer = SimpleNamespace(drain=self.reads.wait)
        self._writes = WriteTimeout(None, seconds=60)

    @property
    def protocol(self) -> Any:
        return self

    @property
    def writing_paused(self) -> bool:
        return not self.reads.is_set()

    def __getitem__(self, key: object) -> WriteTimeout:
        assert key is WRITES
        return self._writes


@pytest.fixture
async def client() -> SlowClient:
    return SlowClient()


def stream(client: SlowClient) -> EventStream:
    response: Any = SimpleNamespace(headers={"Transfer-Encoding": "chunked"})
    request: Any = client
    return EventStream(request, response)


@pytest.mark.parametrize("text", ["a", 'A "\\"\n\0é🪐', "x" * 70_000])
async def test_a_text_is_written_as_the_event_that_holds_it(client: SlowClient, text: str) -> None:
    client.reads.set()
    events = stream(client)
    say = events.put.between(b'data: {"text":', b"}\n\n", lambda: pytest.fail("it keeps up"))
    assert say is not None and say(text)
    assert events.put(data_event({"text": text}))
    assert client.written[0] == client.written[1]


async def test_a_text_to_one_that_does_not_keep_up_is_told_and_to_one_that_has_gone_not_written(
    client: SlowClient,
) -> None:
    told: list[str] = []
    say = stream(client).put.between(b"", b"\n", lambda: told.append("full"))
    assert say is not None and say("a")
    assert (client.written, told) == ([b'4\r\n"a"\n\r\n'], ["full"])
    client.is_gone = True
    assert not say("b")
    assert (len(client.written), len(told)) == (1, 1)


async def test_an_answer_that_is_not_in_chunks_has_no_texts_between(client: SlowClient) -> None:
    response: Any = SimpleNamespace(headers={})
    request: Any = client
    assert EventStream(request, response).put.between(b"", b"", lambda: None) is None


async def passes(work: "asyncio.Task[None]") -> bool:
    """Whether it ends, though nothing else happens."""
    for _ in range(5):
        await asyncio.sleep(0)
    return work.done()


async def test_a_write_waits_for_a_client_that_does_not_keep_up(client: SlowClient) -> None:
    writing = asyncio.create_task(stream(client).write(b"data: 1\n\n"))
    assert not await passes(writing), "more would be buffered for nobody"
    assert client.written == [b"9\r\ndata: 1\n\n\r\n"]
    client.reads.set()
    await writing


async def test_a_write_to_one_that_does_waits_for_nothing(client: SlowClient) -> None:
    client.reads.set()
    assert await passes(asyncio.create_task(stream(client).write(b"data: 1\n\n")))


async def test_deltas_are_taken_when_the_client_keeps_up_again(client: SlowClient) -> None:
    class Deltas:
        """Two deltas of one choice."""

        def __init__(self) -> None:
            self.left = [1, 2]

        async def hand_on(self, take: Any) -> bool:
            while self.left:
                if not take(0, self.left.pop(0)):
                    return True
            return False

    deltas: Any = Deltas()
    events = stream(client)
    handing = asyncio.create_task(events.hand_on(deltas, lambda _, delta: events.put(b"%d" % delta)))
    assert not await passes(handing) and deltas.left == [2]
    client.reads.set()
    await handing
    assert client.written == [b"1\r\n1\r\n", b"1\r\n2\r\n"]
