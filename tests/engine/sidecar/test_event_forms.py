"""Event streams in every form that the standard has, and usage in every form that upstreams have."""

import asyncio

import pytest
from aiohttp import web

from evenhand_engine.sidecar.events import EventReader, Usage, usage_of

from .conftest import DONE, ScriptedUpstream, Sidecar, event, open_stream, usage_event

ENDS = [b"\n", b"\r\n", b"\r"]


def read(*chunks: bytes, hides_usage: bool = True) -> tuple[EventReader, bytes]:
    reader = EventReader(hides_usage=hides_usage)
    return reader, b"".join(map(reader.feed, chunks)) + reader.flush()


@pytest.mark.parametrize("end", ENDS, ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 2, 3, 50, 10_000])
def test_lines_may_end_in_three_ways_and_packets_anywhere(end: bytes, size: int) -> None:
    said = event("first \u00e9") + b": a comment with data: in it\n\n" + event('[DONE] "usage":{')
    whole, without = (text.replace(b"\n", end) for text in (said + usage_event(4, 9) + DONE, said + DONE))
    reader, out = read(*(whole[start : start + size] for start in range(0, len(whole), size)))
    assert out.split() == without.split()
    assert (reader.num_events, reader.is_done) == (2, True)
    assert reader.usage is not None and reader.usage.completion_tokens == 9


@pytest.mark.parametrize("end", ENDS, ids=["LF", "CRLF", "CR"])
def test_an_event_goes_on_when_it_has_ended_and_not_when_the_next_one_comes(end: bytes) -> None:
    said = event().replace(b"\n", end)
    assert EventReader(hides_usage=True).feed(said) == said


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.mark.parametrize("said", [event("x" * size) for size in (0, 1, 100, 186, 187, 188, 4000)])
def test_a_usual_event_in_a_chunk_of_its_own_passes_and_counts(said: bytes) -> None:
    reader = EventReader(hides_usage=True)
    assert reader.passes(framed(said)) and reader.num_events == 1
    assert reader.feed(usage_event(4, 9)) == b"" and reader.num_events == 1
    own = b'data: {"index":0,"content":"x","tokens_evaluated":4,"tokens_predicted":9}\n\n'  # llama.cpp's, in the last event
    reader = EventReader(hides_usage=True)
    assert reader.passes(framed(own)) and reader.usage is not None
    assert (reader.usage.num_prompt_tokens, reader.usage.num_output_tokens) == (4, 9)


@pytest.mark.parametrize(
    "data",
    [
        event(),
        framed(event())[:-1],
        framed(event())[1:],
        framed(event()) + b"1",
        framed(event() + event()),
        framed(event()) + framed(event()),
        framed(event()[:-1]),
        framed(event()[:-2]),
        framed(event() + b"\n"),
        framed(event().replace(b"\n", b"\r\n")),
        framed(event().replace(b"\n", b"\r")),
        framed(event()).replace(b"\r\n", b";x\r\n", 1),
        framed(usage_event(4, 9)),
        framed(DONE),
        framed(b": comment\n\n"),
        framed(b'data: {"error": {"message": "x"}}\n\n'),
        framed(event("x" * 5000)),
        b"0\r\n\r\n",
        b"",
    ],
)
def test_whatever_else_has_to_be_fed(data: bytes) -> None:
    reader = EventReader(hides_usage=True)
    assert not reader.passes(data) and reader.num_events == 0


def test_nothing_passes_behind_an_event_that_has_not_ended() -> None:
    reader = EventReader(hides_usage=True)
    reader.feed(b'data: {"choices":[],"usage":{"prompt_tokens":')
    assert not reader.passes(framed(event()))


def test_data_need_no_space_and_may_have_lines_and_other_fields_around_them() -> None:
    first = b'id: 7\nevent: chunk\ndata:{"choices":[{"text":"x"}]}\nretry: 10\n\n'
    usage = b'data: {"choices":[],\ndata: "usage":{"prompt_tokens":4,\ndata:"completion_tokens":9}}\n\n'
    reader, out = read(first + usage + b"data:[DONE]\n\n")
    assert out == first + b"data:[DONE]\n\n"
    assert (reader.num_events, reader.is_done) == (1, True)
    assert reader.usage is not None and (reader.usage.num_prompt_tokens, reader.usage.num_output_tokens) == (4, 9)


@pytest.mark.parametrize(
    "last",
    [b'event: error\ndata: {"error": {"message": "x"}}\n\n', b'data:{"error":"x"}\r\n\r\n', b": bye\ndata: [DONE]\n\n"],
)
def test_an_end_is_known_in_every_form(last: bytes) -> None:
    reader, out = read(event(), last)
    assert out == event() + last and reader.is_done and reader.num_events == 1


@pytest.mark.parametrize(
    "said",
    [
        b'data: {"content":"[DONE]"}\n\n',
        b'data: {"error":null,"choices":[{"text":"x"}]}\n\n',
        b'event: x\ndata: {"text":"data: [DONE]"}\n\n',
    ],
)
def test_what_only_looks_like_an_end_is_none(said: bytes) -> None:
    for chunks in ([said], [said[:9], said[9:]]):
        reader, out = read(*chunks)
        assert out == said and not reader.is_done and reader.num_events == 1


def test_a_usage_that_may_stand_beside_something_else_is_not_hidden() -> None:
    """Of an event without a list of choices nobody knows what else it says, such as Anthropic's."""
    said = b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":9}}\n\n'
    reader, out = read(event(), said, DONE)
    assert out == event() + said + DONE and reader.usage == Usage(output_tokens=9)


def test_of_two_usages_the_last_counts() -> None:
    reader, out = read(event(), usage_event(4, 8), usage_event(5, 9), DONE)
    assert out == event() + DONE and reader.usage is not None
    assert (reader.usage.num_prompt_tokens, reader.usage.num_output_tokens) == (5, 9)


LIES = {
    "text": b'{"prompt_tokens":"5","completion_tokens":2}',
    "true": b'{"prompt_tokens":true,"completion_tokens":2}',
    "fraction": b'{"prompt_tokens":5.5,"completion_tokens":2}',
    "too large for any number": b'{"prompt_tokens":1e999,"completion_tokens":2}',
    "beyond 64 bits": b'{"prompt_tokens":99999999999999999999999,"completion_tokens":2}',
    "a list": b"[5, 2]",
    "a list of details": b'{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":[1]}',
    "no object": b"7",
    "negative cached": b'{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":-5}}',
    "negative outputs": b'{"prompt_tokens":5,"completion_tokens":-2}',
    "more outputs than asked for": b'{"prompt_tokens":5,"completion_tokens":10}',
    "more than the context": b'{"prompt_tokens":131073,"completion_tokens":2}',
}


@pytest.mark.parametrize("name", LIES)
def test_a_usage_that_lies_is_none_or_not_plausible(name: str) -> None:
    usage = usage_of(b'{"usage":' + LIES[name] + b"}")
    assert usage is None or not usage.is_plausible(131_072, 9)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("name", LIES)
async def test_a_usage_that_lies_is_passed_on_and_not_charged(
    upstream: ScriptedUpstream, sidecar: Sidecar, name: str, is_stream: bool
) -> None:
    whole = b'{"choices":[{"message":{"content":"' + b"x" * 40 + b'"}}],"usage":' + LIES[name] + b"}"
    last = b'data: {"choices":[],"usage":' + LIES[name] + b"}\n\n"

    async def answer(request: web.Request) -> web.StreamResponse:
        if not is_stream:
            return web.Response(body=whole, content_type="application/json")
        response = await open_stream(request)
        for part in (event() * 2, last, DONE):
            await response.write(part)
            await asyncio.sleep(0)
        return response

    upstream.script = answer
    fields = {"stream": is_stream, "max_tokens": 9, "stream_options": {"include_usage": True}}
    async with sidecar.post(fields) as response:
        assert (response.status, await response.read()) == (200, event() * 2 + last + DONE if is_stream else whole)
    await sidecar.settled()
    num_prompt_tokens, num_output_tokens = sidecar.tokens()
    assert 1 <= num_prompt_tokens < 100
    assert num_output_tokens == (2 if is_stream and b'{"' in LIES[name] else 3 if is_stream else 9)
