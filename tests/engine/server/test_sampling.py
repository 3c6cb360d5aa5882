"""What a body asks of the sampling is what the engine core is told."""

from pathlib import Path
from typing import Any

import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import SamplingParams
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import Say, Serve, Server


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(say("ok"))


def told(server: Server, **fields: Any) -> SamplingParams:
    """What the core is told of a completion with these fields, and of a chat: the same."""
    client = server.client()
    client.completions.create(model="tiny", prompt="x", max_tokens=9, extra_body=fields)
    messages: Any = [{"role": "user", "content": "x"}]
    client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, extra_body=fields)
    first, second = (server.core.expect(AddRequest).sampling_params for _ in range(2))
    assert first == second
    return first


def test_penalties_biases_and_masks(server: Server) -> None:
    params = told(
        server,
        seed=1,
        min_p=0.25,
        repetition_penalty=1.5,
        frequency_penalty=-1,
        presence_penalty=0.5,
        logit_bias={"5": 1, "9": -200.0, "7": 200},
        allowed_token_ids=[9, 5, 5],
    )
    assert (params.min_p, params.repetition_penalty) == (0.25, 1.5)
    assert (params.frequency_penalty, params.presence_penalty) == (-1.0, 0.5)
    assert params.logit_bias == ((5, 1.0), (9, -100.0), (7, 100.0))
    assert params.allowed_token_ids == {5, 9}


def test_what_asks_for_nothing(server: Server) -> None:
    params = told(
        server,
        seed=1,
        min_p=0,
        repetition_penalty=1,
        frequency_penalty=0.0,
        presence_penalty=None,
        logit_bias={},
        allowed_token_ids=[],
        bad_words=[],
    )
    stop = params.stop_token_ids
    assert params == SamplingParams(max_tokens=9, seed=1, stop_token_ids=stop)


def test_bad_words_are_forbidden_at_a_beginning_and_after_a_space(server: Server, model_dir: Path) -> None:
    params = told(server, seed=1, bad_words=["capital", " capital", "of"])
    encode = Tokenizer(model_dir).encode
    expected = [tuple(encode(text, False)) for text in ("capital", " capital", "of", " of")]
    assert list(params.bad_words_token_ids) == expected
    assert len(set(expected)) == 4
