"""Several choices of a prompt, and the log probabilities of their tokens, as the official client reads them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import RequestOutput, TokenLogprobs
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import Say, Serve, Server

TEXT = "Paris: 東京 👩‍🚀."  # every code point beyond ASCII is several tokens
MESSAGES: Any = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def told(serve: Serve, say: Say) -> Server:
    """Says TEXT; each token has log probability -0.5, and token 5 with -0.25 and itself are the likeliest."""
    plain = say(TEXT)

    def reply(request: AddRequest) -> Iterator[RequestOutput]:
        num_logprobs = request.sampling_params.num_logprobs
        for output in plain(request):
            if num_logprobs is not None and output.token_ids:
                (token_id,) = output.token_ids
                top_ids, top_values = (5, token_id)[:num_logprobs], (-0.25, -0.5)[:num_logprobs]
                output = msgspec.structs.replace(output, logprobs=(TokenLogprobs(-0.5, 2, top_ids, top_values),))
            yield output

    return serve(reply)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(told: Server, stream: bool) -> None:
    answer: Any = told.client().chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == TEXT
    assert {token.logprob for token in tokens} == {-0.5}
    assert all([top.logprob for top in token.top_logprobs] == [-0.25, -0.5] for token in tokens)
    assert all(token.token == bytes(token.bytes).decode("utf-8", "replace") for token in tokens)


def test_log_probabilities_without_likely_tokens(told: Server) -> None:
    client = told.client()
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    assert all(token.top_logprobs == [] for token in chat.choices[0].logprobs.content)
    assert client.chat.completions.create(model="tiny", messages=MESSAGES).choices[0].logprobs is None
    completion = client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=0)
    assert completion.choices[0].logprobs is not None
    assert set(completion.choices[0].logprobs.top_logprobs or []) == {None}
    assert client.completions.create(model="tiny", prompt="x", max_tokens=50).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_completions(told: Server, stream: bool) -> None:
    answer: Any = told.client().completions.create(
        model="tiny", prompt=["x", "y"], max_tokens=50, logprobs=1, stream=stream
    )
    tokens: list[list[str]] = [[], []]
    offsets: list[list[int]] = [[], []]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
                assert set(choice.logprobs.token_logprobs) <= {-0.5}
                tops = zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True)
                assert all(-0.5 in top.values() and top[token] for token, top in tops)
    assert tokens[0] == tokens[1] and "".join(tokens[0]).startswith("Paris: ")
    assert offsets[0] == [len("".join(tokens[0][:i])) for i in range(len(tokens[0]))]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_chat(told: Server, stream: bool) -> None:
    answer: Any = told.client().chat.completions.create(
        model="tiny", messages=MESSAGES, n=3, seed=2**63 - 2, stream=stream, max_tokens=50
    )
    texts = ["", "", ""]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += (choice.delta.content if stream else choice.message.content) or ""
    assert texts == [TEXT] * 3
    requests = [told.core.expect(AddRequest) for _ in range(3)]
    assert {request.sampling_params.seed for request in requests} == {2**63 - 2, 2**63 - 1, 0}
    assert len({bytes(request.prompt_token_ids) for request in requests}) == 1
    if not stream:
        prompt_tokens = len(requests[0].prompt_token_ids) // 4
        assert answer.usage.prompt_tokens == prompt_tokens, "a prompt counts once"
        assert answer.usage.completion_tokens % 3 == 0


def test_choices_of_several_prompts_follow_each_other(told: Server) -> None:
    answer = told.client().completions.create(model="tiny", prompt=["a", "b"], n=2, echo=True, max_tokens=50)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["a" + TEXT, "a" + TEXT, "b" + TEXT, "b" + TEXT]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 100, "prompt": ["x"] * 3}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "logprobs"),
    ],
)
def test_completions_that_cannot_be_told(told: Server, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        told.client().completions.create(**{"model": "tiny", "prompt": "x", **fields})
    assert caught.value.param == param


@pytest.mark.parametrize("fields", [{"top_logprobs": 2}, {"top_logprobs": 21, "logprobs": True}])
def test_chats_that_cannot_be_told(told: Server, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        told.client().chat.completions.create(model="tiny", messages=MESSAGES, **fields)
    assert caught.value.param == "top_logprobs"


def test_bytes_of_tokens_are_those_of_the_text(model_dir: Path) -> None:
    tokenizer = Tokenizer(model_dir)
    ids = tokenizer.encode(f"<|im_start|>{TEXT}\n\u00a0é")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == f"<|im_start|>{TEXT}\n\u00a0é"
