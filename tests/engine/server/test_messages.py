"""/v1/messages as Anthropic's own client uses it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .conftest import Say, Serve, Server
from .scripted_core import WAIT_SECONDS, ScriptedCore, token_ids

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "input_schema": SCHEMA}
MESSAGES: Any = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(say("Paris, 東京."))


def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, auth_token="none", max_retries=0, timeout=WAIT_SECONDS)


def ask(server: Server, **fields: Any) -> Any:
    with client(server) as asking:
        return asking.messages.create(**{"model": "tiny", "messages": MESSAGES, "max_tokens": 200} | fields)


def prompt_of(server: Server) -> str:
    ids = token_ids(server.core.expect(AddRequest))
    answer = server.client().post(f"{server.url}/detokenize", body={"tokens": ids}, cast_to=dict[str, Any])
    return str(answer["prompt"])


def test_text(server: Server) -> None:
    message = ask(server, system=[{"type": "text", "text": "Be short."}], max_tokens=50, metadata={"user_id": "u"})
    assert [block.text for block in message.content] == ["Paris, 東京."]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    request = server.core.received.queue[-1]
    assert isinstance(request, AddRequest) and request.user == "u"
    num_prompt_tokens = len(token_ids(request))
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (num_prompt_tokens - 3, 3)
    assert prompt_of(server).startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>")


def test_why_it_stopped(server: Server) -> None:
    assert ask(server, max_tokens=2).stop_reason == "max_tokens"
    stopped = ask(server, stop_sequences=["!", ","])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", ",", "Paris")


def test_the_stream_helper(server: Server) -> None:
    with client(server) as asking, asking.messages.stream(model="tiny", messages=MESSAGES, max_tokens=50) as stream:
        assert "".join(stream.text_stream) == "Paris, 東京."
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn" and final.usage.output_tokens > 3


async def test_the_asynchronous_client(server: Server) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=server.url, auth_token="none", timeout=WAIT_SECONDS) as asking,
        asking.messages.stream(model="tiny", messages=MESSAGES, max_tokens=50) as stream,
    ):
        assert await stream.get_final_text() == "Paris, 東京."


@pytest.mark.parametrize("stream", [False, True])
def test_tools(speaking: Callable[..., Server], stream: bool) -> None:
    server = speaking(f"I look. {CALL}")
    if stream:
        fields: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "tools": [WEATHER]}
        with client(server) as asking, asking.messages.stream(**fields) as events:
            message: Any = events.get_final_message()
    else:
        message = ask(server, tools=[WEATHER])
    text, use = message.content
    assert (text.text, use.type, use.name, use.input) == ("I look.", "tool_use", "weather", {"city": "Rome"})
    assert message.stop_reason == "tool_use"


def test_what_came_of_a_tool(speaking: Callable[..., Server]) -> None:
    server = speaking("Sunny.")
    history: Any = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Rome"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "27 C"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    ask(server, messages=history, tools=[WEATHER], tool_choice={"type": "any"})
    request = server.core.received.queue[-1]
    assert isinstance(request, AddRequest) and request.sampling_params.grammar is not None
    assert "<|im_start|>tool\n27 C<|im_end|>\n<|im_start|>user\nSo?<|im_end|>" in prompt_of(server)


def test_a_last_message_of_the_assistant_is_gone_on_with(server: Server) -> None:
    begun: Any = [*MESSAGES, {"role": "assistant", "content": "It is in "}]
    assert ask(server, messages=begun).content[0].text == "Paris, 東京."
    assert prompt_of(server).endswith("<|im_start|>assistant\nIt is in ")
    done: Any = [*begun, {"role": "user", "content": "Sure?"}]
    ask(server, messages=done)
    assert prompt_of(server).endswith("<|im_start|>assistant\n")


def test_thinking_is_a_block(speaking: Callable[..., Server]) -> None:
    server = speaking("<think>hm</think>So.", reasoning_parser="qwen3")
    thinking, text = ask(server).content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "hm", "So.")


@pytest.mark.parametrize(
    ("asked", "told", "budget"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, "True", 1024),
        ({"type": "disabled"}, "False", None),
        ({"type": "adaptive"}, "", None),
        (None, "", None),
    ],
)
def test_whether_the_model_is_to_think_and_how_much(
    tool_model: Path, thinking_model: Path, serve: Serve, say: Say, asked: Any, told: str, budget: int | None
) -> None:
    path = tool_model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "[{{ enable_thinking }}]" + config["chat_template"]
    path.write_text(json.dumps(config))
    server = serve(core=ScriptedCore(say("So."), max_model_len=2048), reasoning_parser="qwen3")
    ask(server, thinking=asked or anthropic.omit)
    reasoning = server.core.received.queue[-1].sampling_params.reasoning
    assert (reasoning and reasoning.budget) == budget
    assert prompt_of(server).startswith(f"[{told}]")


def test_a_budget_of_thinking_that_cannot_be_held_is_refused(speaking: Callable[..., Server]) -> None:
    """The vocabulary has no markers."""
    server = speaking("So.", reasoning_parser="qwen3")
    with pytest.raises(anthropic.BadRequestError, match="no tokens <think>") as caught:
        ask(server, thinking={"type": "enabled", "budget_tokens": 1024})
    assert isinstance(caught.value.body, dict) and caught.value.body["error"]["param"] == "thinking"


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_a_schema(server: Server, name: str) -> None:
    """By its field, and by the one that it had at first."""
    form = {"type": "json_schema", "schema": SCHEMA}
    ask(server, extra_body={name: form if name == "output_format" else {"format": form}})
    assert server.core.expect(AddRequest).sampling_params.grammar is not None


def test_the_clients_own_header(serve: Serve, say: Say) -> None:
    """`Anthropic(api_key=...)` sends `x-api-key`."""
    server = serve(say("ok"), api_key="the-key")
    for key in ("the-key", "another"):
        asking = anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_SECONDS)
        fields: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9}
        with asking:
            if key == "the-key":
                assert asking.messages.create(**fields).content[0].text == "ok"
                assert [model.id for model in asking.models.list()] == ["tiny"]
            else:
                with pytest.raises(anthropic.AuthenticationError):
                    asking.messages.create(**fields)


def test_tokens_are_counted(server: Server) -> None:
    with client(server) as asking:
        counted = asking.messages.count_tokens(model="tiny", messages=MESSAGES)
    assert counted.input_tokens == ask(server).usage.input_tokens + 3


def test_an_end_in_mid_stream_is_an_error(serve: Serve) -> None:
    def reply(request: AddRequest) -> Iterator[RequestOutput]:
        yield RequestOutput(request_id=request.request_id, token_ids=(5,))
        yield RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR)

    with client(serve(reply)) as asking, pytest.raises(anthropic.APIError):
        list(asking.messages.create(model="tiny", messages=MESSAGES, max_tokens=9, stream=True))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": None}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10_000}, "max_tokens", "context_length_exceeded"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "invalid_value"),
        ({"stop_sequences": [""]}, "stop_sequences", "invalid_value"),
        ({"temperature": 1.5}, "temperature", "invalid_value"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking", "unsupported_parameter"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking", "invalid_value"),
        ({"thinking": {"type": "deep"}}, "thinking", "invalid_value"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools", "unsupported_parameter"),
        ({"tools": [WEATHER]}, "tools", "unsupported_parameter"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice", "invalid_value"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: Server, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(server, extra_body=fields)
    assert isinstance(caught.value.body, dict)
    assert (caught.value.body["error"]["param"], caught.value.body["error"]["code"]) == (param, code)
