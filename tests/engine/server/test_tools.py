"""Tools as the official client offers them, and the calls that it gets back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.structured.tools import Answer, Function, calls
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_engine.text.tool_calls import FORMATS

from .conftest import Say, Serve, Server
from .scripted_core import token_ids

MESSAGES: Any = [{"role": "user", "content": "What is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
ROME = {"city": "Rome"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def ask(server: Server, **fields: Any) -> Any:
    defaults: Any = {"model": "tiny", "messages": MESSAGES, "tools": [WEATHER, CLOCK], "max_tokens": 200}
    return server.client().chat.completions.create(**defaults | fields)


def streamed(server: Server, **fields: Any) -> tuple[str, list[dict[str, str]], str | None]:
    """Content, calls with their ids, names and arguments, and the finish reason, from deltas."""
    content, made, reason = "", list[dict[str, str]](), None
    for chunk in ask(server, stream=True, **fields):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.index == len(made):
                made.append({"id": call.id, "name": call.function.name, "arguments": ""})
            made[call.index]["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, made, reason


def test_parallel_calls(speaking: Callable[..., Server], model_dir: Path) -> None:
    server = speaking(f"I look.\n{CALL}\n{OTHER}")
    choice = ask(server).choices[0]
    made = choice.message.tool_calls
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert [(call.function.name, json.loads(call.function.arguments)) for call in made] == [
        ("weather", ROME),
        ("clock", {}),
    ]
    assert {call.type for call in made} == {"function"} and len({call.id for call in made}) == 2
    content, deltas, reason = streamed(server)
    assert (content, reason) == ("I look.", "tool_calls")
    assert [(call["name"], json.loads(call["arguments"])) for call in deltas] == [("weather", ROME), ("clock", {})]
    assert all(call["id"].startswith("call_") for call in deltas)
    prompt = token_ids(server.core.expect(AddRequest))
    text = Tokenizer(model_dir).decode(prompt, skip_special_tokens=False)
    assert text.startswith(f"<tool_call> {json.dumps(WEATHER)}")


def test_one_call_at_a_time(speaking: Callable[..., Server]) -> None:
    server = speaking(f"{CALL}\n{OTHER}")
    assert [call.function.name for call in ask(server, parallel_tool_calls=False).choices[0].message.tool_calls] == [
        "weather"
    ]
    assert [call["name"] for call in streamed(server, parallel_tool_calls=False)[1]] == ["weather"]


def test_the_clients_parse_and_their_stream_helper(speaking: Callable[..., Server]) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    server = speaking(CALL)
    client = server.client()
    answer = client.chat.completions.parse(model="tiny", messages=MESSAGES, tools=[strict], max_tokens=200)
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == ROME
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=[strict], max_tokens=200) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.parsed_arguments) for event in done] == [("weather", ROME)]


def test_text_without_calls_is_an_answer(speaking: Callable[..., Server]) -> None:
    server = speaking("It rains < 3 mm.")
    choice = ask(server).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (
        "It rains < 3 mm.",
        None,
        "stop",
    )
    assert streamed(server) == ("It rains < 3 mm.", [], "stop")


def test_what_the_core_is_told(speaking: Callable[..., Server], model_dir: Path) -> None:
    """Free text, unless a function is strict or a call is demanded."""
    server = speaking(CALL)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    named: Any = {"type": "function", "function": {"name": "clock"}}
    tokenizer = Tokenizer(model_dir)
    weather = Function("weather", json.dumps(SCHEMA))
    clock = Function("clock", json.dumps(CLOCK["function"]["parameters"]))
    form = FORMATS["hermes"]
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({}, None),
        ({"tool_choice": "auto"}, None),
        ({"tool_choice": "required"}, calls(form, [weather, clock], tokenizer, is_required=True, is_parallel=True)),
        ({"tool_choice": named}, calls(form, [clock], tokenizer, is_required=True, is_parallel=False)),
        (
            {"tools": [strict], "parallel_tool_calls": False},
            calls(form, [weather._replace(is_strict=True)], tokenizer, is_required=False, is_parallel=False),
        ),
    ]
    answer = Answer(json.dumps(SCHEMA), is_strict=True)
    form_of_answer: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    both = calls(form, [weather, clock], tokenizer, is_required=False, is_parallel=True, answer=answer)
    cases += [
        ({"response_format": form_of_answer}, both),
        ({"response_format": form_of_answer, "tool_choice": "required"}, cases[2][1]),
        ({"response_format": {"type": "text"}}, None),
    ]
    for fields, expected in cases:
        ask(server, **fields)
        found = server.core.expect(AddRequest).sampling_params.grammar
        assert (found or "").replace(" ", "") == (expected or "").replace(" ", ""), fields


def test_a_named_call_ends_as_a_text_does(speaking: Callable[..., Server]) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    assert ask(speaking(CALL), tool_choice=named).choices[0].finish_reason == "stop"


def test_declined_tools_are_none(speaking: Callable[..., Server], model_dir: Path) -> None:
    server = speaking(CALL)
    choice = ask(server, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and choice.message.content == CALL
    text = Tokenizer(model_dir).decode(token_ids(server.core.expect(AddRequest)), skip_special_tokens=False)
    assert "weather" not in text.partition("<|im_start|>")[0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "d" * 70_000}}]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"tool_choice": "required", "extra_body": {"guided_json": {"type": "object"}}}, "guided_json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "no object"}}},
            "response_format",
        ),
        (
            {
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": 5}, "strict": True}},
                ],
            },
            "tools",
        ),
    ],
)
def test_tools_that_cannot_be(speaking: Callable[..., Server], fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(speaking("x"), **fields)
    assert caught.value.param == param, caught.value.message


def test_a_template_without_tools_says_so(serve: Serve, say: Say) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(serve(say("x")))
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


def test_reasoning_is_told_apart(speaking: Callable[..., Server]) -> None:
    server = speaking(f"<think>hm</think>\n\n{CALL}", reasoning_parser="qwen3")
    message = ask(server).choices[0].message
    assert message.reasoning_content == message.reasoning == "hm"
    assert message.content is None and message.tool_calls[0].function.name == "weather"
    deltas = [chunk.choices[0].delta for chunk in ask(server, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
    hidden = ask(server, extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.reasoning is None and hidden.tool_calls


FUNCTIONS = [Function("weather", json.dumps(SCHEMA), True), Function("clock")]


@pytest.mark.parametrize(
    ("form", "whole"),
    [
        ("hermes", f"{CALL}\n{OTHER}"),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "clock", "arguments": {}}]',
        ),
        ("mistral_args", '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]clock[ARGS]{}'),
        ("granite", '<|tool_call|>[{"name": "clock", "arguments": {}}]'),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "clock", "parameters": {}}'),
    ],
)
def test_grammars_of_calls(model_dir: Path, form: str, whole: str) -> None:
    """They take what models write, no other function and no other arguments."""
    tokenizer = Tokenizer(model_dir)
    compiler = Compiler(lambda: tokenizer)
    eos = min(tokenizer.eos_token_ids)

    def fits(text: str, *, is_required: bool = False, answer: Answer | None = None) -> bool:
        grammar = calls(FORMATS[form], FUNCTIONS, tokenizer, is_required=is_required, is_parallel=True, answer=answer)
        matcher = compiler.compile("t", grammar).deep_copy()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.consume_token(eos)

    assert fits(whole, is_required=True) and fits(whole, is_required=False)
    assert fits("Just text.", is_required=False) and not fits("Just text.", is_required=True)
    other_key = whole.replace("arguments", "args").replace("parameters", "args").replace("[ARGS]", "")
    for wrong in (whole.replace("clock", "other"), other_key):
        assert not fits(wrong, is_required=True) and not fits(wrong, is_required=False)
    if form != "llama3_json":
        assert fits(f"First. {whole}", is_required=False)
    answer = Answer(
        '{"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}', True
    )
    if form == "llama3_json":
        return  # its calls begin as any JSON does
    assert fits(whole, answer=answer) and fits('{"a": 5}', answer=answer)
    for wrong in ("Just text.", '{"b": 5}', f'{{"a": 5}}{whole}', whole.replace("clock", "other")):
        assert not fits(wrong, answer=answer), wrong
    assert not fits('{"a": 5}', is_required=True, answer=answer)
