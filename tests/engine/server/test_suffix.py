"""`suffix`: completions that fill in the middle, where the vocabulary has tokens for that."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import Say, Serve, Server
from .scripted_core import token_ids

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")


@pytest.fixture
def filling(model_dir: Path, serve: Serve, say: Say) -> Iterator[Server]:
    """A server whose tiny model fills in the middle while the test runs."""
    paths = [model_dir / "tokenizer_config.json", model_dir / "config.json"]
    before = [path.read_text() for path in paths]
    tokens = {str(320 + number): {"content": mark, "special": True} for number, mark in enumerate(MARKS)}
    paths[0].write_text(json.dumps(json.loads(before[0]) | {"added_tokens_decoder": tokens}))
    paths[1].write_text(json.dumps(json.loads(before[1]) | {"vocab_size": 324}))
    yield serve(say("is"))
    for path, text in zip(paths, before, strict=True):
        path.write_text(text)


def ask(server: Server, **fields: Any) -> AddRequest:
    assert server.client().completions.create(**{"model": "tiny", "prompt": "Paris ", **fields}).choices[0].text == "is"
    return server.core.expect(AddRequest)


def test_what_stands_before_and_after(filling: Server, model_dir: Path) -> None:
    tokenizer = Tokenizer(model_dir)
    marks = [tokenizer.special_id(mark) for mark in MARKS]
    request = ask(filling, suffix=" here.")
    prompt = "<|fim_prefix|>Paris <|fim_suffix|> here.<|fim_middle|>"
    assert tokenizer.decode(token_ids(request), skip_special_tokens=False) == prompt
    assert request.sampling_params.stop_token_ids == tokenizer.eos_token_ids | set(marks)
    ids = tokenizer.encode("Paris ", add_special_tokens=False)
    assert token_ids(ask(filling, prompt=ids, suffix=" here.")) == token_ids(request)


def test_without_one_nothing_changes(filling: Server, model_dir: Path) -> None:
    tokenizer = Tokenizer(model_dir)
    for fields in ({}, {"suffix": ""}, {"suffix": None}):
        request = ask(filling, **fields)
        assert tokenizer.decode(token_ids(request)) == "Paris "
        assert request.sampling_params.stop_token_ids == tokenizer.eos_token_ids
    ignoring = ask(filling, suffix="!", max_tokens=1, extra_body={"ignore_eos": True})
    assert not ignoring.sampling_params.stop_token_ids


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"suffix": 5}, "invalid_value"),
        ({"suffix": "x" * 5000}, "context_length_exceeded"),
        ({"suffix": "x" * 200, "prompt": "y" * 100}, "context_length_exceeded"),
        ({"suffix": "x", "echo": True}, "invalid_value"),
        ({"suffix": "x", "extra_body": {"truncate_prompt_tokens": 5}}, "invalid_value"),
    ],
)
def test_what_cannot_be_is_refused(filling: Server, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(filling, **fields)
    assert caught.value.code == code


def test_a_model_without_the_tokens_says_so(serve: Serve, say: Say) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(serve(say("is")), suffix="x")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "suffix")
