"""However a client says what an output must look like, the core is told one grammar; what cannot be is refused by name."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler

from .conftest import Say, Serve, Server
from .scripted_core import ScriptedCore

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "x"}]


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(say('{"a": 7}'))


def test_the_vocabulary_is_read_while_the_core_loads(serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than when a request waits for it: while it is read, Python stands still, and with it every stream."""
    core = ScriptedCore(say("x"))
    say_ready = core.start
    monkeypatch.setattr(core, "start", lambda: None)
    monkeypatch.setattr(Compiler, "prepare_aside", lambda compiler: say_ready())
    assert serve(core=core).client().completions.create(model="tiny", prompt="x").choices[0].text == "x"


def told(server: Server, **fields: Any) -> str | None:
    """The grammar that the core is told of a completion with these fields, and of a chat: the same."""
    client = server.client()
    client.completions.create(model="tiny", prompt="x", max_tokens=9, extra_body=fields)
    client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=fields)
    first, second = (server.core.expect(AddRequest).sampling_params.grammar for _ in range(2))
    assert first == second
    return first


def test_each_way_of_saying_it(server: Server) -> None:
    schema, text = json.dumps(SCHEMA), json.dumps(json.dumps(SCHEMA))
    strict = grammars.json_schema(schema, strict=True)
    named = {"name": "n", "schema": SCHEMA}
    ways: list[tuple[dict[str, Any], str | None]] = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, grammars.json_object()),
        ({"response_format": {"type": "json_schema", "json_schema": {**named, "strict": True}}}, strict),
        (
            {"response_format": {"type": "json_schema", "json_schema": named}},
            grammars.json_schema(schema, strict=False),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, strict),
        ({"structured_outputs": {"json": json.loads(text)}}, strict),
        ({"structured_outputs": {"regex": "a+"}}, grammars.regex("a+")),
        ({"structured_outputs": {"choice": ["x", "y"]}}, grammars.choice(["x", "y"])),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, grammars.lark('start: "a"')),
        ({"structured_outputs": {"json_object": True}}, grammars.json_object()),
        (
            {"structured_outputs": {"json_object": True, "whitespace_pattern": "-"}},
            grammars.json_object(whitespace="-"),
        ),
        ({"guided_json": SCHEMA}, strict),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": "-"},
            grammars.json_schema(schema, strict=True, whitespace="-"),
        ),
        ({"guided_regex": "a+"}, grammars.regex("a+")),
        ({"guided_choice": ["x", "y"]}, grammars.choice(["x", "y"])),
        ({"guided_grammar": 'start: "a"'}, grammars.lark('start: "a"')),
    ]
    for fields, expected in ways:
        found = told(server, **fields)
        assert _parsed(found) == _parsed(expected), fields
        assert (found is None) == (expected is None)


def _parsed(grammar: str | None) -> Any:
    return json.loads(grammar) if grammar is not None and grammar[0] == "{" else grammar


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
            "invalid_grammar",
        ),
        ({"response_format": "json"}, "response_format", "invalid_value"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "unsupported_parameter"),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"regex": "((a"}}, "structured_outputs", "invalid_grammar"),
        ({"guided_json": {"$ref": "http://example.com/x"}}, "guided_json", "invalid_grammar"),
        ({"guided_json": "nothing"}, "guided_json", "invalid_grammar"),
        ({"guided_choice": []}, "guided_choice", "invalid_grammar"),
        ({"guided_choice": [5]}, "guided_choice", "invalid_value"),
        ({"guided_choice": ["x" * 70_000]}, "guided_choice", "invalid_value"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "invalid_value"),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens", "invalid_value"),
        ({"guided_regex": "a", "allowed_token_ids": [3]}, "allowed_token_ids", "invalid_value"),
        ({"guided_regex": "a", "bad_words": ["b"]}, "bad_words", "invalid_value"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: Server, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="tiny", prompt="x", max_tokens=9, extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, code), caught.value.message
    assert not any(isinstance(message, AddRequest) for message in server.core.received.queue)


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_no_grammar_is_compiled_on_the_event_loop(server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a short one, which is read there: it may take long all the same."""
    threads: list[str] = []
    compile_grammar = Compiler.compile

    def compile_here(compiler: Compiler, tenant_id: str, grammar: str) -> Any:
        threads.append(threading.current_thread().name)
        return compile_grammar(compiler, tenant_id, grammar)

    monkeypatch.setattr(Compiler, "compile", compile_here)
    client, body = server.client(), {"guided_regex": "a"}
    if path == "chat":
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=body)
    else:
        client.completions.create(model="tiny", prompt="x", extra_body=body)
    assert threads and "server" not in threads, "where the loop runs"


def test_an_engine_that_knows_no_grammars_says_so(serve: Serve, say: Say) -> None:
    """Free text would be the wrong answer."""
    server = serve(core=ScriptedCore(say("x"), knows_grammars=False))
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="tiny", prompt="x", extra_body={"guided_regex": "a"})
    assert caught.value.code == "unsupported_parameter"
    server.client().completions.create(model="tiny", prompt="x", extra_body={"response_format": {"type": "text"}})


class Answer(pydantic.BaseModel):
    a: int


def test_the_clients_parse(server: Server) -> None:
    completion = server.client().chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Answer)
    assert completion.choices[0].message.parsed == Answer(a=7)
    grammar = server.core.expect(AddRequest).sampling_params.grammar
    assert grammar is not None and "additionalProperties" in grammar


def test_the_clients_stream_of_a_parsed_answer(server: Server) -> None:
    with server.client().chat.completions.stream(model="tiny", messages=MESSAGES, response_format=Answer) as stream:
        events = list(_events(stream))
    assert events[-1].parsed == Answer(a=7)


def _events(stream: Any) -> Iterator[Any]:
    yield from (event for event in stream if event.type == "content.done")
