"""What is said reaches its reader in the call that brings it, at the reader's pace, and whatever goes wrong is the reader's."""

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from evenhand_engine.backends.backend import Delta, GenerationRequest
from evenhand_engine.backends.stream import LocalStream
from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.claims import Claim
from evenhand_engine.frontend.door import Door
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.openai.deltas import Deltas
from evenhand_engine.openai.generation import Generation
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, SamplingParams
from evenhand_engine.text.detokenizer import Detokenizer, text_of
from evenhand_engine.text.text_decoder import ByteDecoder

WAIT_SECONDS = 120.0
LETTERS = {letter: chr(letter) if letter < 128 else bytes([letter]) for letter in range(256)}


class Quiet:
    """A claim, and a door, of which nothing is asked but how long the queue is."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    async def queue_delay(self, tenant_id: str) -> float:
        return 7.0


class Scripted:
    """A backend with one stream for each generation; `say` is what the core brings."""

    def __init__(self) -> None:
        self.streams: list[LocalStream] = []
        self.backend = self

    def generate(self, request: GenerationRequest, observer: Generation) -> LocalStream:
        text = Detokenizer(ByteDecoder(LETTERS))
        self.streams.append(LocalStream(request, observer, text, lambda *_: None))
        return self.streams[-1]

    def say(self, index: int, text: str = "", finish: FinishReason | None = None) -> None:
        self.streams[index].receive(
            RequestOutput(request_id=str(index), token_ids=tuple(map(ord, text)), finish_reason=finish), 0.0
        )


class Reader:
    """Takes deltas, and is full after `room` of them."""

    def __init__(self, room: int = 10_000) -> None:
        self.room = room
        self.taken: list[tuple[int, str]] = []

    def take(self, index: int, delta: Delta) -> bool:
        if delta.pieces:
            self.taken.append((index, text_of(delta.pieces)))
            self.room -= 1
        return self.room > 0


def begun(num_generations: int = 1) -> tuple[Scripted, Deltas]:
    scripted, generations = Scripted(), []
    for index in range(num_generations):
        request = GenerationRequest(
            request_id=str(index),
            tenant_id="t",
            prompt_token_ids=array("I", [1]),
            sampling_params=SamplingParams(max_tokens=9),
            arrival_time=0.0,
        )
        generation = Generation(cast(EngineService, scripted), request, cast(Claim, Quiet()))
        generation.begin()
        generations.append(generation)
    return scripted, Deltas(generations, cast(Door, Quiet()))


@contextlib.asynccontextmanager
async def reading(deltas: Deltas, reader: Reader) -> "AsyncIterator[asyncio.Task[bool]]":
    task = asyncio.create_task(deltas.hand_on(reader.take))
    await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_SECONDS):
        yield task
        if not task.done():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_each_is_handed_on_in_the_call_that_brings_it() -> None:
    (scripted, deltas), reader = begun(2), Reader()
    async with reading(deltas, reader) as task:
        for index, text in ((0, "a"), (1, "b"), (1, "c"), (0, "d")):
            scripted.say(index, text)
            assert reader.taken[-1] == (index, text), "no other turn of the loop was needed"
        scripted.say(0, "e", FinishReason.LENGTH)
        assert not task.done(), "the other has not ended"
        scripted.say(1, "", FinishReason.LENGTH)
        assert await task is False


async def test_a_reader_who_is_full_is_left_alone_and_gets_the_rest_as_one() -> None:
    (scripted, deltas), reader = begun(2), Reader(room=2)
    async with reading(deltas, reader) as task:
        for text in "abcd":
            scripted.say(0, text)
            scripted.say(1, text.upper())
        assert await task is True
    assert reader.taken == [(0, "a"), (1, "A")]
    reader.room = 10
    async with reading(deltas, reader):
        assert sorted(reader.taken[2:]) == [(0, "bcd"), (1, "BCD")]


@pytest.mark.parametrize(
    ("news", "shown"),
    [("xy", "xy"), ("\xc3", None), ("\xc3\xa9", "é"), ("", None)],
    ids=["two", "part", "whole", "none"],
)
async def test_text_goes_past_deltas_until_other_news(news: str, shown: str | None) -> None:
    (scripted, deltas), (reader, said) = begun(2), (Reader(), [""])
    async with reading(deltas, reader):
        scripted.say(0, "a")
        deltas.pass_text(0, lambda text: not said.append(text))
        scripted.say(1, "A")
        for text in "bc":
            scripted.say(0, text)
            assert said[-1] == text, "no other turn of the loop was needed"
        assert reader.taken == [(0, "a"), (1, "A")]
        scripted.say(0, news)
        scripted.say(0, "d")
        told = [text for text in (shown, "d" if shown or not news else "\ufffdd") if text]
        assert (said, reader.taken[2:]) == (["", "b", "c"], [(0, text) for text in told])
        assert scripted.streams[0].num_taken == 3 + len(news) + 1


async def test_text_that_nobody_takes_is_in_the_next_delta() -> None:
    (scripted, deltas), reader = begun(), Reader()
    async with reading(deltas, reader):
        scripted.say(0, "a")
        deltas.pass_text(0, lambda text: False)
        scripted.say(0, "b")
        assert (reader.taken, scripted.streams[0].num_taken) == ([(0, "a"), (0, "b")], 2)


async def test_text_that_fills_the_reader_is_the_last_until_he_asks_for_more() -> None:
    (scripted, deltas), (reader, said) = begun(2), (Reader(), list[str]())

    def say(text: str) -> bool:
        said.append(text)
        deltas.fill()
        return True

    async with reading(deltas, reader) as task:
        for index in range(2):
            scripted.say(index, "a")
            deltas.pass_text(index, say)
        for text in "bc":
            scripted.say(0, text)
            scripted.say(1, text.upper())
        assert await task is True
    assert (said, reader.taken) == (["b"], [(0, "a"), (1, "a")])
    async with reading(deltas, reader):
        assert sorted(reader.taken[2:]) == [(0, "c"), (1, "BC")]


async def test_text_is_not_offered_before_what_waits_was_taken_nor_after_the_end() -> None:
    scripted, deltas = begun()
    scripted.say(0, "a")
    deltas.pass_text(0, lambda text: pytest.fail("out of order"))
    scripted.say(0, "b")
    _, delta = await anext(deltas)
    assert text_of(delta.pieces) == "ab"
    scripted.streams[0].close()
    deltas.pass_text(0, lambda text: pytest.fail("nobody is there"))
    scripted.say(0, "c")


async def test_a_quota_that_is_used_up_ends_text_that_goes_past_deltas() -> None:
    (scripted, deltas), (reader, said) = begun(), (Reader(), list[str]())
    async with reading(deltas, reader) as task:
        scripted.say(0, "a")
        deltas.pass_text(0, lambda text: not said.append(text))
        scripted.say(0, "b")
        scripted.streams[0].finish()  # as its claim does, in the midst of a token
        scripted.say(0, "c")
        assert await task is False
    assert (said, reader.taken) == (["b"], [(0, "a"), (0, "c")])


async def test_of_several_a_slow_reader_gets_each_in_its_turn() -> None:
    scripted, deltas = begun(3)
    takers = []
    for _ in range(6):
        for index in range(3):
            scripted.say(index, "x")
        index, _ = await anext(deltas)
        takers.append(index)
    assert takers == [0, 1, 2] * 2


async def test_a_last_delta_that_fills_the_reader_is_the_last() -> None:
    (scripted, deltas), reader = begun(), Reader(room=1)
    scripted.say(0, "a", FinishReason.LENGTH)
    assert await deltas.hand_on(reader.take) is True
    assert await deltas.hand_on(reader.take) is False
    assert [delta async for delta in deltas] == []


async def test_one_by_one() -> None:
    scripted, deltas = begun()
    for text in "ab":
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        scripted.say(0, text)
        scripted.say(0, text)
        index, delta = await waiting
        assert (index, text_of(delta.pieces)) == (0, text), "the second time waits"
        index, delta = await anext(deltas)
        assert text_of(delta.pieces) == text


async def test_what_the_reader_raises_is_raised_there_and_nowhere_else() -> None:
    def fail(index: int, delta: Delta) -> bool:
        raise ConnectionResetError

    scripted, deltas = begun(2)
    task = asyncio.create_task(deltas.hand_on(fail))
    await asyncio.sleep(0)
    scripted.say(1, "a")
    with pytest.raises(ConnectionResetError):
        await task


async def test_who_was_cancelled_is_given_nothing() -> None:
    (scripted, deltas), reader = begun(), Reader()
    async with reading(deltas, reader) as task:
        task.cancel()
        scripted.say(0, "a")
        assert reader.taken == []


@pytest.mark.parametrize("text", ["", "ab"])
async def test_a_request_without_a_result_is_a_refusal_after_what_came_before(text: str) -> None:
    (scripted, deltas), reader = begun(2), Reader()
    async with reading(deltas, reader) as task:
        scripted.say(1, text, FinishReason.QUEUE_TIMEOUT)
        with pytest.raises(Refusal) as caught:
            await task
        assert (caught.value.code, caught.value.retry_after) == ("queue_timeout", 7.0)
        assert reader.taken == ([(1, text)] if text else [])


async def test_a_refusal_in_the_queue_is_the_first_thing_that_is_said() -> None:
    """So that it can be an HTTP status."""
    scripted, deltas = begun()
    waiting = asyncio.ensure_future(anext(deltas))
    await asyncio.sleep(0)
    scripted.say(0, "", FinishReason.TENANT_SUSPENDED)
    with pytest.raises(Refusal, match="suspended"):
        await waiting


async def test_what_was_not_read_comes_before_the_news_of_a_death() -> None:
    (scripted, deltas), reader = begun(), Reader()
    scripted.say(0, "ab")
    scripted.streams[0].lose("it died", 0.0)
    with pytest.raises(EngineDeadError):
        await deltas.hand_on(reader.take)
    assert reader.taken == [(0, "ab")]


async def test_a_reader_who_is_full_hears_of_a_death_when_he_asks_for_more() -> None:
    (scripted, deltas), reader = begun(), Reader(room=1)
    scripted.say(0, "ab")
    scripted.streams[0].lose("it died", 0.0)
    assert await deltas.hand_on(reader.take) is True
    with pytest.raises(EngineDeadError):
        await deltas.hand_on(reader.take)
    assert reader.taken == [(0, "ab")]
