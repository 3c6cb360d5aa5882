"""/openapi.json says what the server takes and answers: schemathesis asks as it says, and otherwise, and reads the answers by it."""

import contextlib
import typing
from collections.abc import Iterator
from typing import Any

import httpx2
import hypothesis
import msgspec
import pytest
import schemathesis
from msgspec import Raw
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from evenhand_engine.server.openapi import document
from evenhand_engine.server.routes import ROUTES

from .conftest import Say, Serve, Server
from .scripted_core import WAIT_SECONDS, ScriptedCore

KEY = "the-key"
NUM_EXAMPLES = 20  # of each operation, as the document says and otherwise
BODIES = {route.body for route in ROUTES if route.body is not None}
LEFT_OUT = {
    "positive_data_acceptance",  # a context, a vocabulary and a chat template refuse what no schema can tell
    "negative_data_rejection",  # `priority` and what is unknown are ignored, as by vLLM, and 2.0 is an integer
    "missing_required_header",
    "use_after_free",
    "ensure_resource_availability",
    "object_level_authorization",
    "max_response_time",
}


EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
EVENTS = "text/event-stream"


def strict() -> dict[str, Any]:
    """The document, by which an answer has nothing that is not described; schemathesis takes what is said of a stream for what
    is said of each of its events."""
    described = document()
    for content in contents(described):
        if EVENTS in content:
            content[EVENTS]["schema"] = EVENT | {"additionalProperties": False}
    schemas = described["components"]["schemas"]
    answers = {kind.__name__ for route in ROUTES for kind in _structs(route.answer)} | {"Error", "ErrorDetails"}
    for name in answers:
        schemas[name]["additionalProperties"] = False
    return described


def contents(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """By media type, of the answer where nothing is wrong, of each operation."""
    for operations in described["paths"].values():
        for operation in operations.values():
            yield operation["responses"]["200"].get("content", {})


def _structs(hint: Any) -> Iterator[Any]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
        for part in typing.get_type_hints(hint).values():
            yield from _structs(part)
    for part in typing.get_args(hint):
        yield from _structs(part)


SCHEMA = schemathesis.openapi.from_dict(strict())
OPERATIONS = {result.ok().label: result.ok() for result in SCHEMA.get_all_operations()}
STREAMED = ["POST /v1/completions", "POST /v1/chat/completions", "POST /v1/responses", "POST /v1/messages"]
load_all_checks()


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(core=ScriptedCore(say('{"a": [1]}'), max_model_len=1024, scores_prompts=False), api_key=KEY)


def test_the_server_publishes_it(server: Server) -> None:
    answer = httpx2.get(f"{server.url}/openapi.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == msgspec.json.decode(msgspec.json.encode(document()))
    assert set(answer.json()["paths"]) == {route.path.replace(":.+}", "}") for route in ROUTES}


@pytest.mark.parametrize("body", BODIES, ids=lambda kind: kind.__name__)
def test_it_says_what_every_member_holds_that_is_not_refused(body: type[msgspec.Struct]) -> None:
    described = document()["components"]["schemas"][body.__name__]["properties"]
    refused = {"background", "conversation", "max_tool_calls", "previous_response_id", "prompt", "top_logprobs"}
    refused |= {"truncation", "container", "mcp_servers", "access_programs", "context_management", "image"}
    hints = typing.get_type_hints(body)
    raw = {name for name in body.__struct_fields__ if Raw in (hints[name], *typing.get_args(hints[name]))}
    assert {name for name in raw if "anyOf" not in described[name]} <= refused


def test_what_is_streamed_is_tried_in_events() -> None:
    assert sum(EVENTS in content for content in contents(document())) == len(STREAMED)


@pytest.mark.parametrize("label", STREAMED)
def test_schemathesis_in_events(server: Server, label: str) -> None:
    check(server, label, GenerationMode.POSITIVE, stream=True)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as it says", "otherwise"])
@pytest.mark.parametrize("label", OPERATIONS)
def test_schemathesis(server: Server, label: str, mode: GenerationMode) -> None:
    check(server, label, mode)


def check(server: Server, label: str, mode: GenerationMode, **always: Any) -> None:
    """Ask as the document says, or otherwise, with these members at any rate."""
    operation = OPERATIONS[label]
    checks = [check for check in CHECKS.get_all() if check.__name__ not in LEFT_OUT]
    headers = {"Authorization": f"Bearer {KEY}"}

    @hypothesis.settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
            case.body.pop("model", None)  # or hardly any would name the one that is served
            case.body |= always
        answer = case.call(base_url=server.url, headers=headers, timeout=WAIT_SECONDS)
        case.validate_response(answer, checks=checks, headers=headers)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing about it can be wrong
        ask()
