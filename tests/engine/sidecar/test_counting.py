"""How prompts and outputs are counted: by token ids, a tokenizer here, the upstream's, bytes; and by usage at the end."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from aiohttp import web
from tokenizers import models, pre_tokenizers

from evenhand_engine.frontend.fair_executor import FairExecutor
from evenhand_engine.sidecar.body import Body
from evenhand_engine.sidecar.counting import PromptCounter
from evenhand_engine.sidecar.events import EventReader, Usage, usage_of
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import DONE, ScriptedUpstream, Sidecar, Start, event, usage_event

TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A tokenizer of which every word is a token."""
    vocabulary = {"<unk>": 0, "<s>": 1, "word": 2}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


def chat(text: str, **fields: Any) -> Body:
    return Body(json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode())


def completion(prompt: Any) -> Body:
    return Body(json.dumps({"prompt": prompt}).encode())


async def test_a_tokenizer_here_counts_what_the_model_will_read(sidecar: Sidecar, model_dir: Path) -> None:
    executor = FairExecutor(1)
    counter = PromptCounter(sidecar.upstream, Tokenizer(model_dir), executor)

    async def count(body: Body) -> int:
        return await counter.count("team", body, is_limited=False)

    assert await count(completion("word word word")) == 3
    assert await count(chat("word word")) == 3  # one is the template's
    assert await count(chat("word " * 5000)) == 5001  # not on the event loop
    assert await count(completion([7, 8, 9, 10])) == 4
    with_tools = chat("word", tools=[{"type": "function", "function": {"name": "x" * 400}}])
    assert 90 < await count(with_tools) < 200
    estimate = counter.bytes_per_token.estimate
    for odd in (
        completion(["x", "y"]),
        completion({"a": 1}),
        chat("x", messages="none"),
        Body(b"no JSON", is_json=False),
    ):
        assert await count(odd) == estimate("team", odd.num_bytes), odd.encode()
    executor.close()


async def test_a_sidecar_is_given_a_tokenizer(upstream: ScriptedUpstream, start: Start, model_dir: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=event() + DONE, content_type="text/event-stream")

    upstream.script = answer
    sidecar = await start(upstream.url, tokenizer=model_dir)
    await sidecar.stream(messages=[{"role": "user", "content": "word " * 60}])
    await sidecar.settled()
    assert sidecar.tokens() == (61, 1)


@pytest.mark.parametrize(
    ("server", "body", "path", "asked", "answer", "expected"),
    [
        ("x", chat("hi"), "/tokenize", "messages", {"count": 9, "tokens": [1] * 9}, 9),
        ("x", completion("hi"), "/tokenize", "prompt", {"count": 3}, 3),
        ("llama.cpp", completion("hi"), "/tokenize", "content", {"tokens": [4, 5]}, 2),
        ("llama.cpp", chat("hi"), "/v1/chat/completions/input_tokens", "messages", {"input_tokens": 31}, 31),
        ("x", chat("a" * 400), "/tokenize", "messages", {"error": "unknown"}, 110),
        ("x", chat("a" * 400), "/tokenize", "messages", {"count": "many"}, 110),
    ],
)
async def test_the_upstreams_tokenizer_is_asked_in_its_own_words(
    upstream: ScriptedUpstream,
    start: Start,
    server: str,
    body: Body,
    path: str,
    asked: str,
    answer: dict[str, Any],
    expected: int,
) -> None:
    async def reply(request: web.Request) -> web.StreamResponse:
        return web.json_response(answer)

    upstream.script, upstream.server = reply, server
    sidecar = await start(upstream.url)
    await sidecar.until(lambda: sidecar.upstream.problem is None)
    assert await sidecar.prompts.count("team", body, is_limited=False) == body.num_bytes // 4
    assert not upstream.received, "asked although no limit depends on it"
    assert await sidecar.prompts.count("team", body, is_limited=True) == pytest.approx(expected, abs=3)
    assert upstream.received[-1][0] == path and asked in upstream.body()


ANSWERS = {
    "openai": (b'{"usage":{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}}', 1),
    "anthropic": (b'{"usage":{"input_tokens":5,"output_tokens":2}}', 0),
    "responses": (b'{"type":"response.completed","response":{"usage":{"input_tokens":5,"output_tokens":2}}}', 0),
    "llama.cpp": (b'{"content":"x","tokens_evaluated":5,"tokens_predicted":2,"timings":{"cache_n":3}}', 3),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_usage_is_read_in_everybodys_words(name: str) -> None:
    answer, num_cached_tokens = ANSWERS[name]
    usage = usage_of(answer)
    assert usage is not None
    assert (usage.num_prompt_tokens, usage.num_output_tokens, usage.num_cached_tokens) == (5, 2, num_cached_tokens)


def read(*events: bytes) -> tuple[EventReader, bytes]:
    reader = EventReader(hides_usage=True)
    return reader, b"".join(reader.feed(event) for event in events) + reader.flush()


def test_usage_beside_the_last_choice_counts_and_stays() -> None:
    """As llama.cpp sends it for completions, and vLLM with continuous_usage_stats."""
    last = b'data: {"choices":[{"text":"","finish_reason":"length"}],"usage":{"prompt_tokens":4,"completion_tokens":9}}\n\n'
    reader, out = read(event(), last.replace(b"9", b"8"), last, DONE)
    assert out == event() + last.replace(b"9", b"8") + last + DONE
    assert reader.usage == Usage(4, 9) and reader.num_events == 3 and reader.is_done


def test_usage_in_two_parts_is_put_together() -> None:
    """As Anthropic's messages tell it."""
    begin = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7}}}\n\n'
    end = b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":3}}\n\n'
    reader, out = read(begin, end)
    assert out == begin + end and reader.usage is not None
    assert (reader.usage.num_prompt_tokens, reader.usage.num_output_tokens) == (7, 3)


def test_text_that_looks_like_a_usage_is_text() -> None:
    said = event('"choices":[], "usage":{"prompt_tokens":1,"completion_tokens":1}')
    reader, out = read(said, DONE)
    assert out == said + DONE and reader.usage is None and reader.num_events == 1


def test_a_usage_that_comes_in_pieces_is_hidden_all_the_same() -> None:
    whole = usage_event(4, 9)
    for cut in range(1, len(whole)):
        reader, out = read(event() + whole[:cut], whole[cut:] + DONE)
        assert out == event() + DONE and reader.usage is not None and reader.usage.completion_tokens == 9


@pytest.mark.parametrize("seed", range(60))
def test_events_are_read_the_same_however_they_come(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [
        *(event("x"), event('"usage"'), event().replace(b"}\n\n", b', "usage": null}\n\n'), b": ping\n\n"),
        *(
            b'event: delta\ndata: {"text": "y"}\n\n',
            event()[:-2] + b"\r\n\r\n",
            event()[:-2] + b"\r\r",
            b"data: a\ndata: b\n\n",
            b"\n\n",
        ),
        *(usage_event(3, 4), event().replace(b"}\n\n", b', "usage": {"prompt_tokens": 5}}\n\n'), event() * 3),
    ]
    events = rng.choices(kinds, k=rng.randint(1, 12))
    events += rng.choice([[], [DONE], [b'data: {"error": {}}\n\n'], [b'data: {"tokens_predicted": 7}\n\n']])
    one_by_one, out = read(*events)
    whole = b"".join(events)
    edges = [0, *sorted(rng.choices(range(len(whole)), k=rng.randint(0, 6))), len(whole)]
    some = [whole[start:end] for start, end in pairwise(edges)]
    pairs = [b"".join(events[index : index + 2]) for index in range(0, len(events), 2)]
    for pieces in ([whole], some, pairs, [bytes([byte]) for byte in whole]):
        reader, same = read(*pieces)
        assert same == out
        assert (reader.num_events, reader.is_done) == (one_by_one.num_events, one_by_one.is_done)
        assert reader.usage == one_by_one.usage


async def test_no_more_is_sent_than_llama_cpp_has_slots(upstream: ScriptedUpstream, start: Start) -> None:
    """And its longest context so far is not taken for the size of its cache."""
    upstream.props, upstream.server = {"total_slots": 2, "default_generation_settings": {"n_ctx": 2048}}, "llama.cpp"
    upstream.metrics = "llamacpp:n_tokens_max 33\nllamacpp:requests_deferred 0\n"
    sidecar = await start(upstream.url)
    window = sidecar.upstream.dispatcher.window
    await sidecar.until(lambda: window.num_seats == 2 and bool(sidecar.upstream.metrics_text))
    assert sidecar.upstream.connection.backend == "llama.cpp" and window.kv_tokens == float("inf")


@pytest.mark.parametrize("kv_tokens", [None, 5_000])
async def test_a_given_size_of_the_cache_is_not_overruled(
    upstream: ScriptedUpstream, start: Start, kv_tokens: int | None
) -> None:
    upstream.metrics = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
    sidecar = await start(upstream.url, kv_tokens=kv_tokens)
    await sidecar.until(lambda: bool(sidecar.upstream.metrics_text))
    assert sidecar.upstream.dispatcher.window.kv_tokens == pytest.approx(0.95 * (kv_tokens or 1_600))


def test_llama_cpps_own_stream_tells_its_counts_in_the_last_event() -> None:
    events = [
        b'data: {"content":"a","stop":false,"tokens_predicted":1,"tokens_evaluated":6}\n\n',
        b'data: {"content":"","stop":true,"tokens_predicted":2,"tokens_evaluated":6,"timings":{"cache_n":4}}\n\n',
    ]
    reader, out = read(*events)
    assert out == b"".join(events) and reader.usage is not None
    assert (reader.usage.num_prompt_tokens, reader.usage.num_output_tokens, reader.usage.num_cached_tokens) == (6, 2, 4)


@pytest.mark.parametrize("max_num_seqs", [None, 7])
async def test_given_seats_are_not_overruled(
    upstream: ScriptedUpstream, start: Start, max_num_seqs: int | None
) -> None:
    upstream.props = {"total_slots": 2}
    sidecar = await start(upstream.url, max_num_seqs=max_num_seqs)
    await sidecar.until(lambda: sidecar.upstream.problem is None)
    await sidecar.until(lambda: sidecar.upstream.dispatcher.window.num_seats == (max_num_seqs or 2))


@pytest.mark.parametrize("together", [True, False])
def test_each_kind_of_event_is_known_alone_and_beside_others(together: bool) -> None:
    error = b'data: {"error":{"message":"x"}}\n\n'
    events = [event(), usage_event(4, 9), event("z"), error]
    reader, out = read(*([b"".join(events)] if together else events))
    assert out == event() + event("z") + error
    assert reader.num_events == 2 and reader.is_done
    assert reader.usage is not None and reader.usage.completion_tokens == 9
