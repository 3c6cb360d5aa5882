"""Several choices of a prompt, and the log probabilities of their tokens, as the official client reads them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import RequestOutput, TokenLogprobs
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import Say, Serve, Server
from .scripted_core import ScriptedCore, token_ids

TEXT = "Paris: 東京 👩‍🚀."  # every code point beyond ASCII is several tokens
MESSAGES: Any = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def told(serve: Serve, say: Say) -> Server:
    """Says TEXT; each token has log probability -0.5, and token 5 with -0.25 and itself are the likeliest."""
    plain = say(TEXT)

    def reply(request: AddRequest) -> Iterator[RequestOutput]:
        num_logprobs, of_prompt = request.sampling_params.num_logprobs, request.sampling_params.num_prompt_logprobs
        for output in plain(request):
            if of_prompt is not None and output.token_ids:
                first = TokenLogprobs(-0.75, 3, (5, 6)[:of_prompt], (-0.25, -0.5)[:of_prompt])
                told = (first, *[TokenLogprobs(-1.5, 1)] * (len(request.prompt_token_ids) // 4 - 2))
                output, of_prompt = msgspec.structs.replace(output, prompt_logprobs=told), None
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
def test_tokens_told_by_their_ids(told: Server, model_dir: Path, stream: bool) -> None:
    """`return_tokens_as_token_ids`, as vLLM's: other names, and the same places in the text."""
    tokenizer = Tokenizer(model_dir)
    ids = [f"token_id:{token_id}" for token_id in (*tokenizer.encode(TEXT), min(tokenizer.eos_token_ids))]
    fields: Any = {"model": "tiny", "stream": stream, "max_tokens": 50}
    asked = {"return_tokens_as_token_ids": True}
    chats: Any = told.client().chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body=asked, **fields
    )
    parts = [chunk.choices[0].logprobs for chunk in (chats if stream else [chats])]
    tokens = [token for part in parts if part for token in part.content]
    assert [token.token for token in tokens] == ids[: len(tokens)] and len(tokens) >= len(ids) - 1
    assert all([top.token for top in token.top_logprobs] == ["token_id:5", token.token] for token in tokens)
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == TEXT
    named, offsets = list[str](), list[int]()
    for more, names in (({}, list[str]()), (asked, named)):
        answer: Any = told.client().completions.create(prompt="x", logprobs=2, extra_body=more, **fields)
        found = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
        names += [token for part in found if part for token in part.tokens]
        places = [offset for part in found if part for offset in part.text_offset]
        assert offsets in ([], places)
        offsets = places
    assert named == ids[: len(named)] and len(named) == len(tokens)


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


def test_the_metric_of_choices_counts_each_prompt_once(told: Server) -> None:
    told.client().completions.create(model="tiny", prompt=["a", "b"], n=3, max_tokens=50)
    metrics = httpx2.get(f"{told.url}/metrics").text
    told_of = dict(re.findall(r"^vllm:request_params_n_(count|sum)\{.*\} (\S+)$", metrics, re.MULTILINE))
    assert told_of == {"count": "2.0", "sum": "6.0"}


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


def test_an_echo_with_log_probabilities_tells_those_of_the_prompt_first(told: Server) -> None:
    """As lm-eval reads them: none of the first token, then the prompt's, then the output's."""
    prompt = "capital of France"
    answer = told.client().completions.create(model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None
    num_prompt_tokens = len(told.core.expect(AddRequest).prompt_token_ids) // 4
    assert "".join(found.tokens or ()).startswith(prompt)
    assert found.token_logprobs == [None, -0.75, *[-1.5] * (num_prompt_tokens - 2), -0.5]
    assert found.top_logprobs is not None and found.top_logprobs[0] is None
    assert max((found.top_logprobs[1] or {}).values()) == -0.25 and -0.75 in found.top_logprobs[1].values()
    assert found.text_offset == [len("".join((found.tokens or ())[:i])) for i in range(num_prompt_tokens + 1)]


@pytest.mark.parametrize(
    ("fields", "param"), [({"prompt_logprobs": 1}, "prompt_logprobs"), ({"echo": True, "logprobs": 1}, "logprobs")]
)
def test_an_engine_that_does_not_score_prompts_says_so(
    serve: Serve, say: Say, fields: dict[str, Any], param: str
) -> None:
    client = serve(core=ScriptedCore(say("x"), scores_prompts=False)).client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x y", extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    assert client.completions.create(model="tiny", prompt="x y", echo=True).choices[0].text.startswith("x y")


def test_an_echo_alone(told: Server) -> None:
    """`max_tokens` 0: lm-eval and others score prompts so."""
    answer = told.client().completions.create(model="tiny", prompt="capital", echo=True, logprobs=0, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("capital", "length")
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or ()) == answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError):
        told.client().completions.create(model="tiny", prompt="x", max_tokens=0)


def test_log_probabilities_of_prompts_by_token_id(told: Server, model_dir: Path) -> None:
    client, tokenizer = told.client(), Tokenizer(model_dir)
    body = {"prompt_logprobs": 2}
    completion: Any = client.completions.create(
        model="tiny", prompt=["capital of", "x of"], max_tokens=1, extra_body=body
    )
    for choice, prompt in zip(completion.choices, ("capital of", "x of"), strict=True):
        ids = tokenizer.encode(prompt)
        none, told_first, *others = choice.prompt_logprobs
        assert none is None and len(others) == len(ids) - 2
        own = {"logprob": -0.75, "rank": 3, "decoded_token": tokenizer.token_bytes(ids[1]).decode()}
        assert told_first[str(ids[1])] == own
        assert {entry["rank"] for entry in told_first.values()} == {1, 2, 3}
        assert told_first["6"]["logprob"] == -0.5
    chat: Any = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1, extra_body=body)
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens and chat.prompt_logprobs[0] is None


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids(told: Server, model_dir: Path, stream: bool) -> None:
    """Of prompt and output, the stop token that is not shown among them."""
    tokenizer = Tokenizer(model_dir)
    output = [*tokenizer.encode(TEXT), min(tokenizer.eos_token_ids)]
    body = {"return_token_ids": True}
    client = told.client()
    answer: Any = client.completions.create(
        model="tiny", prompt=["x of", "y"], max_tokens=99, logprobs=0, stream=stream, extra_body=body
    )
    ids: list[list[int]] = [[], []]
    prompts: list[list[int]] = [[], []]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            ids[choice.index] += getattr(choice, "token_ids", [])
            prompts[choice.index] += getattr(choice, "prompt_token_ids", [])
    assert ids == [output, output]
    assert prompts == [tokenizer.encode("x of"), tokenizer.encode("y")]
    chat: Any = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=99, stream=stream, extra_body=body
    )
    chunks = list(chat) if stream else [chat]
    assert [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", [])] == output
    assert sum(len(getattr(chunk, "prompt_token_ids", None) or ()) for chunk in chunks) > 5


def test_the_best_of_several(serve: Serve, say: Say) -> None:
    """By the mean log probability of their tokens; the others are counted, not told."""

    def reply(request: AddRequest) -> Iterator[RequestOutput]:
        number = request.sampling_params.seed
        for output in say("abcd"[number] * (number + 1))(request):
            logprobs = (TokenLogprobs((-0.5, -0.1, -0.9, -0.2)[number], 1),) if output.token_ids else ()
            yield msgspec.structs.replace(output, logprobs=logprobs)

    client = serve(reply).client()
    answer = client.completions.create(model="tiny", prompt=["x", "y"], seed=0, n=2, best_of=4, max_tokens=9)
    assert [choice.text for choice in answer.choices] == ["bb", "dddd", "bb", "dddd"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in answer.choices)
    assert answer.usage is not None and answer.usage.completion_tokens == 2 * (2 + 3 + 4 + 5)


@pytest.mark.parametrize("prompt", ["The capital of France is Paris.", [[5, 6, 7, 8, 9]]])
def test_truncated_prompts(told: Server, model_dir: Path, prompt: Any) -> None:
    ids = Tokenizer(model_dir).encode(prompt) if isinstance(prompt, str) else prompt[0]
    client = told.client()
    answer = client.completions.create(
        model="tiny", prompt=prompt, echo=True, max_tokens=1, extra_body={"truncate_prompt_tokens": 3}
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == 3
    assert token_ids(told.core.expect(AddRequest)) == ids[-3:]
    assert answer.choices[0].text.startswith(Tokenizer(model_dir).decode(ids[-3:]))
    answer = client.completions.create(
        model="tiny", prompt="x " * 2000, max_tokens=6, extra_body={"truncate_prompt_tokens": -1}
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == 250, "what the context of 256 has room for"


def test_bytes_of_tokens_are_those_of_the_text(model_dir: Path) -> None:
    tokenizer = Tokenizer(model_dir)
    ids = tokenizer.encode(f"<|im_start|>{TEXT}\n\u00a0é")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == f"<|im_start|>{TEXT}\n\u00a0é"
