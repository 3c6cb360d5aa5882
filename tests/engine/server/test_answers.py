"""What the server answers is what the published document says of it, and nothing more."""

import json
from typing import Any

import httpx2
import msgspec
import pytest

from evenhand_engine.anthropic.answers import Message
from evenhand_engine.openai.answers import ChatCompletion, ChatCompletionChunk, Completion
from evenhand_engine.openai.response_answers import Response
from evenhand_engine.scheduler.request import TokenLogprobs

from .conftest import AddRequest, Say, Serve, Server
from .scripted_core import ScriptedCore

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
WEATHER = {"name": "weather", "parameters": {"type": "object"}}
MESSAGES = [{"role": "user", "content": "Where?"}]
USAGE = {"stream_options": {"include_usage": True}}
TOLD = {"return_token_ids": True, "prompt_logprobs": 2}


def ask(server: Server, path: str, fields: dict[str, Any]) -> httpx2.Response:
    answer = httpx2.post(f"{server.url}{path}", json=fields)
    assert answer.status_code == 200, answer.text
    return answer


def assert_described(said: bytes, kind: type[msgspec.Struct]) -> None:
    assert json.loads(msgspec.json.encode(msgspec.json.decode(said, type=kind))) == json.loads(said)


@pytest.fixture
def server(tool_model: None, serve: Serve, say: Say) -> Server:
    plain = say(f"<think>hm</think>I look. {CALL}")

    def reply(request: AddRequest) -> Any:
        params, num_told = request.sampling_params, len(request.prompt_token_ids) // 4 - 1
        told = (TokenLogprobs(-0.5, 1, (5,), (-0.5,)),) * num_told
        for output in plain(request):
            if output.token_ids and params.num_prompt_logprobs is not None and told:
                output, told = msgspec.structs.replace(output, prompt_logprobs=told), ()
            if output.token_ids and params.num_logprobs is not None:
                top = ((5,), (-0.25,)) if params.num_logprobs else ((), ())
                output = msgspec.structs.replace(output, logprobs=(TokenLogprobs(-0.5, 2, *top),))
            yield output

    return serve(core=ScriptedCore(reply, max_model_len=2048), reasoning_parser="qwen3")


@pytest.mark.parametrize(
    ("path", "kind", "fields"),
    [
        ("/v1/chat/completions", ChatCompletion, {}),
        ("/v1/chat/completions", ChatCompletion, {"tools": [{"type": "function", "function": WEATHER}], "n": 2}),
        ("/v1/chat/completions", ChatCompletion, {"logprobs": True, "top_logprobs": 1, **TOLD}),
        ("/v1/completions", Completion, {}),
        ("/v1/completions", Completion, {"logprobs": 1, "echo": True, "n": 2, **TOLD}),
        ("/v1/responses", Response, {"tools": [{"type": "function", **WEATHER}], "instructions": "Be short."}),
        ("/v1/responses", Response, {"max_output_tokens": 2, "metadata": {"a": "b"}, "text": {"format": None}}),
        ("/v1/messages", Message, {"tools": [{"name": "weather", "input_schema": {"type": "object"}}]}),
        ("/v1/messages", Message, {"max_tokens": 2}),
    ],
)
def test_answers(server: Server, path: str, kind: type[msgspec.Struct], fields: dict[str, Any]) -> None:
    defaults: dict[str, Any] = {"max_tokens": 200, "messages": MESSAGES}
    if path.endswith("completions") and "chat" not in path:
        defaults = {"max_tokens": 200, "prompt": "xy"}
    elif path.endswith("responses"):
        defaults = {"input": "Where?"}
    assert_described(ask(server, path, defaults | fields).content, kind)


@pytest.mark.parametrize("fields", [{}, USAGE, {"return_token_ids": True}, {"logprobs": True}])
def test_events_of_chats(server: Server, fields: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    body = {"messages": MESSAGES, "tools": tools, "stream": True, "max_tokens": 200, **fields}
    events = _events(ask(server, "/v1/chat/completions", body))
    for event in events:
        assert_described(event, ChatCompletionChunk)
    assert any(b"tool_calls" in event for event in events) and any(b"reasoning" in event for event in events)


@pytest.mark.parametrize("fields", [{}, USAGE, {"return_token_ids": True, "echo": True}, {"logprobs": 1}])
def test_events_of_completions(server: Server, fields: dict[str, Any]) -> None:
    for event in _events(ask(server, "/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 50, **fields})):
        assert_described(event, Completion)


def _events(answer: httpx2.Response) -> list[bytes]:
    *events, done = [line.removeprefix("data: ").encode() for line in answer.text.splitlines() if line]
    assert events and done == b"[DONE]"
    return events
