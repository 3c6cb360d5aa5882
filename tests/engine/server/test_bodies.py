"""Whatever a body holds, reading it makes no more objects than what is asked for needs, and keeps none of it."""

import contextlib
import gc
import threading
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_engine.errors import Refusal
from evenhand_engine.messages import AddRequest
from evenhand_engine.openai import prompts
from evenhand_engine.openai.bodies import first_elements, parse_body, token_ids, without_raw
from evenhand_engine.openai.prompts import PromptReader
from evenhand_engine.openai.reading import num_bytes
from evenhand_engine.openai.schema import ChatCompletionRequest, CompletionRequest
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import Serve

SIZE = 1_000_000


def many(element: bytes) -> bytes:
    """A JSON list of about a megabyte."""
    return b"[" + b",".join([element] * (SIZE // (len(element) + 1))) + b"]"


def chat(message: bytes) -> bytes:
    return b'{"messages":[' + message + b"]}"


HOSTILE = {
    "unknown": b'{"prompt":"x","junk":' + many(b"[]") + b"}",
    "unsupported": b'{"prompt":"x","logit_bias":' + many(b"{}") + b"}",
    "model": b'{"prompt":"x","model":"' + b"m" * SIZE + b'"}',
    "stop": b'{"prompt":"x","stop":' + many(b'"a"') + b"}",
    "stop ids": b'{"prompt":"x","stop_token_ids":' + many(b"1000") + b"}",
    "texts": b'{"prompt":' + many(b'""') + b"}",
    "lists": b'{"prompt":' + many(b"[]") + b"}",
    "ids": b'{"prompt":' + many(b"300") + b"}",
    "short ids": b'{"prompt":' + many(b"1") + b"}",
    "lists of ids": b'{"prompt":[' + b",".join([many(b"300")] * 2) + b"]}",
    "messages": b'{"messages":' + many(b'{"role":"u"}') + b"}",
    "parts": chat(b'{"role":"u","content":' + many(b'{"type":"text","text":""}') + b"}"),
    "tool calls": chat(b'{"role":"u","tool_calls":' + many(b"{}") + b"}"),
    "kwargs": b'{"messages":[{"role":"u"}],"chat_template_kwargs":{"a":' + many(b"[]") + b"}}",
    "wide kwargs": b'{"messages":[{"role":"u"}],"chat_template_kwargs":{"a":"' + b"a" * SIZE + b'"}}',
    "nothing": b'{"prompt":"x"' + b" " * SIZE + b"}",
}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


def read(tokenizer: Tokenizer, raw: bytes, max_model_len: int) -> Any:
    reader = PromptReader(tokenizer, max_model_len)
    if raw.startswith(b'{"messages"'):
        chat_body = parse_body(raw, ChatCompletionRequest)
        return without_raw(chat_body), reader.chat(chat_body)
    body = parse_body(raw, CompletionRequest)
    return without_raw(body), reader.completion(body)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("max_model_len", [256, 10**7], ids=["short context", "long context"])
def test_no_object_for_each_thing_in_a_body(tokenizer: Tokenizer, name: str, max_model_len: int) -> None:
    """So little is made of it, peak and rest, that no step of it can hold the interpreter for long."""
    raw = HOSTILE[name]
    for first in (b'{"prompt":["x"]}', chat(b'{"role":"u","content":[{"type":"text","text":"x"}]}')):
        read(tokenizer, first, 256)  # so that what is made once is not counted
    gc.collect()
    tracemalloc.start()
    try:
        with contextlib.suppress(Refusal):
            _kept = read(tokenizer, raw, max_model_len)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4.5 * len(raw)
    assert held < 2 * len(raw) + 20_000


def test_raw_members_are_dropped(tokenizer: Tokenizer) -> None:
    fields, _ = read(tokenizer, b'{"prompt":"x","logprobs":null,"max_tokens":3}', 256)
    assert fields.max_tokens == 3
    assert not any(isinstance(getattr(fields, name), msgspec.Raw) for name in fields.__struct_fields__)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=30), st.sampled_from(["", " ", "\n\t"]))
def test_token_ids_are_read_in_parts(ids: list[int], space: str) -> None:
    raw = msgspec.Raw(f"[{space}{f'{space},{space}'.join(map(str, ids))}{space}]".encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evenhand_engine.openai.bodies._CHUNK_BYTES", 7)
        assert token_ids(raw, "prompt") == array("I", ids)


@pytest.mark.parametrize(
    "raw", [b"[1,[2]]", b'[1,"2,3"]', b"[1,2.5]", b"[1,-1]", b"[[1],2]", b'{"a":1}', b"3", b"[1,null]"]
)
@pytest.mark.parametrize("chunk", [1, 3, 65536])
def test_what_are_no_token_ids(raw: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_engine.openai.bodies._CHUNK_BYTES", chunk)
    with pytest.raises(Refusal) as caught:
        token_ids(msgspec.Raw(raw), "prompt")
    assert caught.value.status == 400


@pytest.mark.parametrize("place", [0, 4, 5, 11])
def test_an_unknown_token_is_found_wherever_it_is(
    tokenizer: Tokenizer, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_IDS_AT_A_TIME", 5)
    ids = array("I", range(12))
    prompts.check_token_ids(tokenizer, array("I"), "prompt")
    prompts.check_token_ids(tokenizer, ids, "prompt")
    ids[place] = tokenizer.vocab_size
    with pytest.raises(Refusal, match=f"Token id {tokenizer.vocab_size} is not"):
        prompts.check_token_ids(tokenizer, ids.tolist(), "prompt")


def test_first_elements() -> None:
    assert [bytes(e) for e in first_elements(msgspec.Raw(b'[1, "a" ,[2]]'), 2, "x")] == [b"1", b'"a"']
    assert first_elements(msgspec.Raw(b"[]"), 2, "x") == []


@pytest.mark.parametrize("endpoint", ["completion", "chat"])
def test_text_that_cannot_fit_is_not_tokenized(
    tokenizer: Tokenizer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "_tokenizer", None)
    text = b"x" * 100_000
    bodies = {"completion": b'{"prompt":"' + text + b'"}', "chat": chat(b'{"role":"u","content":"' + text + b'"}')}
    with pytest.raises(Refusal) as caught:
        read(tokenizer, bodies[endpoint], 256)
    assert caught.value.code == "context_length_exceeded"


def test_a_running_request_holds_its_token_ids_alone(serve: Serve) -> None:
    server = serve()
    body = b'{"prompt":[1,2,3],"stream":true,"junk":"' + b"j" * 50_000 + b'"}'
    with httpx2.Client(timeout=120) as client, contextlib.suppress(httpx2.HTTPError):
        asking = threading.Thread(target=lambda: client.post(f"{server.url}/v1/completions", content=body))
        asking.start()
        server.core.expect(AddRequest)
        tenant = httpx2.get(f"{server.admin_url}/v1/tenants").json()["tenants"][0]
        assert tenant["bodyBytes"] == 3 * 4
        server.core.die()
        asking.join(120)


@pytest.mark.parametrize("separator", [b",", b"[", b"{"])
def test_a_body_of_too_many_values_is_not_decoded(separator: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding holds Python for its whole time: every stream would stand still."""
    monkeypatch.setattr("evenhand_engine.openai.bodies._MAX_VALUES", 100)
    monkeypatch.setattr("evenhand_engine.openai.bodies._MANY_BYTES", 50)
    body = b'{"prompt":"' + separator * 95 + b'","n":1}'
    assert parse_body(body, CompletionRequest).n == 1
    monkeypatch.setattr("evenhand_engine.openai.bodies.msgspec.json.decode", None)
    with pytest.raises(Refusal, match="more than 100 commas") as caught:
        parse_body(body.replace(separator, separator * 2), CompletionRequest)
    assert caught.value.status == 400


def test_an_answer_that_is_made_of_a_body_counts_instead_of_it() -> None:
    """It may be much larger."""
    assert num_bytes((b"abc", "d", [array("I", [1, 2])], 7, None)) == 3 + 1 + 8
