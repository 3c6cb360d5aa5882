"""/v1/responses as the official client uses it: text, streams, structure and tools."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .conftest import Say, Serve, Server
from .scripted_core import token_ids

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(say("Paris, 東京."))


def prompt_of(server: Server) -> str:
    detokenized = server.client().post(
        f"{server.url}/detokenize",
        body={"tokens": token_ids(server.core.expect(AddRequest))},
        cast_to=dict[str, Any],
    )
    return str(detokenized["prompt"])


def test_text(server: Server) -> None:
    answer = server.client().responses.create(
        model="tiny", input="Where?", instructions="Be short.", max_output_tokens=50, metadata={"a": "b"}
    )
    assert (answer.output_text, answer.status, answer.store) == ("Paris, 東京.", "completed", False)
    assert answer.usage is not None and answer.usage.input_tokens_details.cached_tokens == 3
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be short.", {"a": "b"}, 50)
    assert prompt_of(server) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_conversation(server: Server) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    server.client().responses.create(model="tiny", input=items)
    assert prompt_of(server).split("<|im_end|>")[:3] == [
        "<|im_start|>user\na\nb",
        "\n<|im_start|>assistant\nc",
        "\n<|im_start|>user\nd",
    ]


def test_a_limit_makes_it_incomplete(server: Server) -> None:
    answer = server.client().responses.create(model="tiny", input="x", max_output_tokens=2)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"


def test_a_stream_builds_the_response(server: Server) -> None:
    events = list(server.client().responses.create(model="tiny", input="x", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type for event in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Paris, 東京."
    assert events[-1].type == "response.completed" and events[-1].response.output_text == "Paris, 東京."
    with server.client().responses.stream(model="tiny", input="x") as stream:
        assert stream.get_final_response().output_text == "Paris, 東京."


async def test_the_asynchronous_client(server: Server) -> None:
    async with server.async_client() as client:
        assert (await client.responses.create(model="tiny", input="x")).output_text == "Paris, 東京."


class City(pydantic.BaseModel):
    city: str


def test_the_clients_parse(serve: Serve, say: Say) -> None:
    server = serve(say('{"city": "Rome"}'))
    answer = server.client().responses.parse(model="tiny", input="x", text_format=City)
    assert answer.output_parsed == City(city="Rome")
    assert server.core.expect(AddRequest).sampling_params.grammar is not None


def test_calls_and_what_came_of_them(speaking: Callable[..., Server]) -> None:
    server = speaking(f"I look. {CALL}")
    client = server.client()
    answer = client.responses.create(model="tiny", input="x", tools=[WEATHER])
    message, call = answer.output
    assert message.type == "message" and answer.output_text == "I look."
    assert call.type == "function_call" and (call.name, call.arguments) == ("weather", '{"city": "Rome"}')
    with client.responses.stream(model="tiny", input="x", tools=[WEATHER]) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert final.output[1].type == "function_call" and final.output[1].arguments == '{"city": "Rome"}'
    history: Any = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "Sunny."},
    ]
    while not server.core.received.empty():
        server.core.received.get()
    client.responses.create(
        model="tiny", input=history, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}
    )
    assert "<|im_start|>tool\nSunny.<|im_end|>" in prompt_of(server)


def test_reasoning_is_an_item(speaking: Callable[..., Server]) -> None:
    server = speaking("<think>hm</think>So.", reasoning_parser="qwen3")
    with server.client().responses.stream(model="tiny", input="x") as stream:
        names = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.reasoning_text.delta" in names
    assert [item.type for item in final.output] == ["reasoning", "message"] and final.output_text == "So."


def test_an_end_in_mid_stream_is_told(serve: Serve) -> None:
    def reply(request: AddRequest) -> Iterator[RequestOutput]:
        yield RequestOutput(request_id=request.request_id, token_ids=(5,))
        yield RequestOutput(request_id=request.request_id, finish_reason=FinishReason.ERROR)

    *_, last = serve(reply).client().responses.create(model="tiny", input="x", stream=True)
    assert last.type == "response.failed" and last.response.error is not None


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"include": ["message.output_text.logprobs"]}, "include", "unsupported_parameter"),
        ({"include": "all"}, "include", "invalid_value"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "unsupported_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [{"type": "image_generation_call"}]}, "input", "invalid_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"max_output_tokens": 10_000}, "max_output_tokens", "context_length_exceeded"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "text", "invalid_grammar"),
        ({"text": {"format": {"type": "text", "x": "y" * 70_000}}}, "text", "invalid_value"),
        ({"tools": [WEATHER]}, "tools", "unsupported_parameter"),
        ({"text": {"verbosity": "low"}}, "text", "unsupported_parameter"),
        ({"metadata": 5}, "metadata", "invalid_value"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    server: Server, fields: dict[str, Any], param: str | None, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().responses.create(model="tiny", input="x", extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, code), caught.value.message
    assert "`messages`" not in caught.value.message and "`response_format`" not in caught.value.message
