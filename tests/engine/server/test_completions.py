"""Completions and chats, whole and streamed, by OpenAI's own client."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from evenhand_engine.messages import AbortRequest, AddRequest
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import Say, Serve, Server
from .scripted_core import token_ids

PARIS = "The capital of France is Paris."
UNICODE = "Käse 3 €, 東京 👩‍🚀🪐!"


@pytest.fixture
def paris(serve: Serve, say: Say) -> Server:
    return serve(say(PARIS))


def ask(client: openai.OpenAI | openai.AsyncOpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What is the capital of France?"}], **options
    )


def test_chat(paris: Server) -> None:
    answer = ask(paris.client())
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == PARIS
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    request = paris.core.expect(AddRequest)
    usage = answer.usage
    assert usage.prompt_tokens == len(token_ids(request))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_chat_renders_the_template(paris: Server, model_dir: Path) -> None:
    ask(paris.client())
    prompt = Tokenizer(model_dir).decode(token_ids(paris.core.expect(AddRequest)), skip_special_tokens=False)
    assert prompt == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def test_chat_stream(paris: Server) -> None:
    chunks = list(ask(paris.client(), stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == PARIS
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_text_comes_as_it_is_generated(serve: Serve, model_dir: Path) -> None:
    server = serve()
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with server.async_client() as client:
        asking = asyncio.create_task(ask(client, stream=True, stream_options=options))
        request_id = (await asyncio.to_thread(server.core.expect, AddRequest)).request_id
        server.core.output(RequestOutput(request_id=request_id))
        chunks = aiter(await asking)
        for number, token_id in enumerate(Tokenizer(model_dir).encode("abc"), 1):
            server.core.output(RequestOutput(request_id=request_id, token_ids=(token_id,)))
            if number == 1:
                assert (await anext(chunks)).choices[0].delta.role == "assistant"
            chunk = await anext(chunks)
            assert (chunk.choices[0].delta.content, chunk.usage.completion_tokens) == ("abc"[number - 1], number)
        server.core.output(RequestOutput(request_id=request_id, finish_reason=FinishReason.LENGTH))
        assert (await anext(chunks)).choices[0].finish_reason == "length"


def test_stream_usage(paris: Server) -> None:
    *chunks, last = ask(paris.client(), stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens > 3
    assert last.usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_continuous_usage(paris: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in ask(paris.client(), stream=True, stream_options=options)]
    assert counts == sorted(counts)


async def test_async_clients_at_once(paris: Server) -> None:
    async with paris.async_client() as client:
        answers = await asyncio.gather(*(ask(client) for _ in range(20)))
    assert {answer.choices[0].message.content for answer in answers} == {PARIS}
    assert len({answer.id for answer in answers}) == 20


async def test_async_stream(paris: Server) -> None:
    async with paris.async_client() as client:
        stream = await ask(client, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == PARIS


def test_completion_default_is_16_tokens(serve: Serve, say: Say) -> None:
    server = serve(say("a" * 100))
    answer = server.client().completions.create(model="tiny", prompt="x")
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"


def test_completion_prompts(serve: Serve, say: Say) -> None:
    server = serve(say(PARIS))
    create = server.client().completions.create
    texts = create(model="tiny", prompt=["one", "two"], max_tokens=50)
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert [choice.text for choice in texts.choices] == [PARIS, PARIS]
    sent = [token_ids(server.core.expect(AddRequest)) for _ in range(2)]
    ids = create(model="tiny", prompt=sent, max_tokens=50)
    assert [token_ids(server.core.expect(AddRequest)) for _ in range(2)] == sent
    assert ids.usage.prompt_tokens == texts.usage.prompt_tokens == sum(map(len, sent))
    assert create(model="tiny", prompt=sent[0], max_tokens=50).choices[0].text == PARIS
    assert token_ids(server.core.expect(AddRequest)) == sent[0]


def test_completion_stream_of_two_prompts(paris: Server) -> None:
    texts = ["", ""]
    stream = paris.client().completions.create(model="tiny", prompt=["one", "two"], stream=True, max_tokens=50)
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [PARIS, PARIS]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(paris: Server, stream: bool) -> None:
    prompt = "Say <|im_end|> \n: "
    answer = paris.client().completions.create(model="tiny", prompt=prompt, echo=True, stream=stream, max_tokens=50)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == prompt + PARIS


def test_token_ids_are_echoed_as_what_they_stand_for(paris: Server) -> None:
    prompts = httpx2.post(f"{paris.url}/tokenize", json={"prompt": "<|im_end|> a"}).json()["tokens"]
    answer = paris.client().completions.create(model="tiny", prompt=[prompts, prompts], echo=True, max_tokens=50)
    assert [choice.text for choice in answer.choices] == ["<|im_end|> a" + PARIS] * 2


def test_stream_never_splits_a_character(serve: Serve, say: Say) -> None:
    server = serve(say(UNICODE))
    pieces = [c.choices[0].delta.content for c in ask(server.client(), stream=True) if c.choices[0].delta.content]
    assert "".join(pieces) == UNICODE
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_and_the_request(serve: Serve, say: Say, stream: bool) -> None:
    core_reply = say(PARIS)

    def endless(request: AddRequest) -> Iterator[RequestOutput]:
        yield from (o for o in core_reply(request) if o.finish_reason is None)

    server = serve(endless)
    answer = ask(server.client(), stop=["Rome", "Paris"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == ("The capital of France is ", "stop")
    abort = server.core.expect(AbortRequest)
    assert abort.reason is FinishReason.STOP
    if not stream:
        assert abort.num_output_tokens == answer.usage.completion_tokens


def test_stop_string_included_on_request(paris: Server) -> None:
    answer = ask(paris.client(), stop=["France"], extra_body={"include_stop_str_in_output": True})
    assert answer.choices[0].message.content == "The capital of France"


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_token_ends_the_text_and_is_shown_on_request_only(serve: Serve, say: Say, included: bool) -> None:
    server = serve(say("Rome, Paris"))
    comma = httpx2.post(f"{server.url}/tokenize", json={"prompt": ","}).json()["tokens"]
    body = {"stop_token_ids": comma, "include_stop_str_in_output": included}
    answer = server.client().completions.create(model="tiny", prompt="x", max_tokens=50, extra_body=body)
    assert answer.choices[0].text == ("Rome," if included else "Rome")
    assert answer.choices[0].finish_reason == "stop"


def test_sampling_parameters_arrive(paris: Server) -> None:
    ask(
        paris.client(),
        temperature=0.5,
        top_p=0.9,
        seed=-2,
        max_tokens=7.0,  # type: ignore[arg-type] # an integer all the same
        extra_body={"top_k": -1, "min_tokens": 2, "stop_token_ids": [9]},
    )
    params = paris.core.expect(AddRequest).sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 0, 7)
    assert params.seed == 2**63 - 2
    assert params.min_tokens == 2
    assert params.stop_token_ids == {2, 9}
    ask(paris.client(), max_tokens=3, extra_body={"ignore_eos": True})
    assert paris.core.expect(AddRequest).sampling_params.stop_token_ids == frozenset()
    for _ in range(2):
        ask(paris.client(), seed=-1)
    seeds = {paris.core.expect(AddRequest).sampling_params.seed for _ in range(2)}
    assert len(seeds) == 2, "-1 asks for a random seed"


def test_a_completion_may_be_limited_by_either_name(paris: Server) -> None:
    body = {"max_completion_tokens": 5}
    paris.client().completions.create(model="tiny", prompt="x", extra_body=body)
    assert paris.core.expect(AddRequest).sampling_params.max_tokens == 5


def test_a_request_may_bring_its_own_id(paris: Server) -> None:
    assert ask(paris.client(), extra_body={"request_id": "mine-1"}).id == "chatcmpl-mine-1"


def test_a_developer_speaks_as_the_system(paris: Server) -> None:
    prompts = []
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        paris.client().chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
        prompts.append(token_ids(paris.core.expect(AddRequest)))
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("method", "path", "allowed"), [("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models", "GET,HEAD")]
)
def test_a_method_that_is_not_allowed_says_which_are(paris: Server, method: str, path: str, allowed: str) -> None:
    answer = httpx2.request(method, paris.url + path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["Allow"] == allowed


def test_chat_without_max_tokens_may_fill_the_context(paris: Server) -> None:
    ask(paris.client())
    request = paris.core.expect(AddRequest)
    assert len(token_ids(request)) + request.sampling_params.max_tokens == paris.core.max_model_len


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (FinishReason.QUEUE_TIMEOUT, 503, "queue_timeout"),
        (FinishReason.TENANT_SUSPENDED, 403, "tenant_suspended"),
        (FinishReason.OVERLOADED, 400, "overloaded"),
        (FinishReason.GRAMMAR, 400, "grammar_too_complex"),
        (FinishReason.ERROR, 500, "engine_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused_in_the_queue_is_a_status(
    serve: Serve, reason: FinishReason, status: int, code: str, stream: bool
) -> None:
    server = serve(lambda request: [RequestOutput(request_id=request.request_id, finish_reason=reason)])
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server.client(), stream=stream)
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert caught.value.response.headers["X-Evenhand-Reason"] == code


@pytest.mark.parametrize(
    ("reason", "code"), [(FinishReason.ERROR, "engine_error"), (FinishReason.GRAMMAR, "grammar_too_complex")]
)
def test_error_in_a_stream_is_an_event(serve: Serve, say: Say, reason: FinishReason, code: str) -> None:
    def reply(request: AddRequest) -> Iterator[RequestOutput]:
        outputs = list(say(PARIS)(request))
        yield from outputs[:3]
        yield RequestOutput(request_id=request.request_id, finish_reason=reason)

    text = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in ask(serve(reply).client(), stream=True):
            text += chunk.choices[0].delta.content or ""
    assert caught.value.code == code
    assert text


def test_models(paris: Server) -> None:
    models = paris.client().models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert models[0].max_model_len == paris.core.max_model_len
    assert paris.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        paris.client().models.retrieve("gpt-4")
