"""Fields of bodies: bad ones are named, unsupported ones refused, those that ask for nothing pass."""

from typing import Any

import pytest

from evenhand_engine.messages import AddRequest

from .conftest import Say, Serve, Server
from .posting import CHAT, COMPLETION, error, post


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(say("ok"), max_request_bytes=100_000)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["x"] * 300}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logprobs": 1, "echo": True, "stream": True}, "logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": [7] * 100}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"request_id": "a b"}, "request_id"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"3": "x"}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(7_500)}}, "logit_bias"),
        ({"allowed_token_ids": [320]}, "allowed_token_ids"),
        ({"allowed_token_ids": [0] * 25_000}, "allowed_token_ids"),
        ({"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 7}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1, 320], "min_tokens": 2}, "stop_token_ids"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 3}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"echo": 1}, "echo"),
        ({"user": 5}, "user"),
        ({"user": "u" * 513}, "user"),
        ({"model": 5}, "model"),
    ],
)
def test_bad_values_name_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    status, answer = error(server, "/v1/completions", COMPLETION | fields)
    assert status == 400
    assert answer["param"] == param, answer
    assert answer["type"] == "invalid_request_error"
    assert server.core.received.empty() or not isinstance(server.core.received.queue[-1], AddRequest)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": [{}]}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"documents": [{}]}}, "chat_template_kwargs"),
        ({"echo": True}, "echo"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ],
)
def test_bad_chats_name_the_field(server: Server, fields: dict[str, Any], param: str) -> None:
    status, answer = error(server, "/v1/chat/completions", CHAT | fields)
    assert (status, answer["param"]) == (400, param), answer


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag"}},
        {"suffix": "x"},
        {"guided_decoding_backend": "xgrammar"},
        {"logits_processors": ["f"]},
        {"use_beam_search": True},
    ],
)
def test_known_but_unsupported_fields_are_refused(server: Server, fields: dict[str, Any]) -> None:
    (name,) = fields
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        status, answer = error(server, path, body | fields)
        assert (status, answer["param"], answer["code"]) == (400, name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/v1/completions", COMPLETION, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("/v1/completions", COMPLETION, {"tool_choice": "required"}),
        ("/v1/completions", COMPLETION, {"include_reasoning": False}),
        ("/v1/chat/completions", CHAT, {"best_of": 2}),
    ],
)
def test_fields_of_the_other_endpoint_are_refused(
    server: Server, path: str, body: dict[str, Any], fields: dict[str, Any]
) -> None:
    (name,) = fields
    status, answer = error(server, path, body | fields)
    assert (status, answer["param"], answer["code"]) == (400, name, "unsupported_parameter")


def test_integers_may_have_a_fraction_of_nothing(server: Server) -> None:
    """As OpenAI and vLLM read them: 2.0 is an integer, 2.5 is none."""
    whole: dict[str, Any] = {"max_tokens": 2.0, "seed": 3.0, "top_k": 4e0, "n": 1.0, "min_tokens": 1.0}
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        assert post(server, path, body | whole)[0] == 200
        params = server.core.expect(AddRequest).sampling_params
        assert (params.max_tokens, params.seed, params.top_k, params.min_tokens) == (2, 3, 4, 1)
        assert [type(value) for value in (params.max_tokens, params.seed)] == [int, int]
        for name in whole:
            assert error(server, path, body | {name: 2.5})[1]["param"] == name
    texts = {"model": "tiny", "max_tokens": 2.0, "messages": [{"role": "user", "content": "x"}]}
    assert post(server, "/v1/messages", texts)[0] == 200
    assert server.core.expect(AddRequest).sampling_params.max_tokens == 2


def test_tools_that_must_not_be_called_are_none(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert post(server, "/v1/chat/completions", CHAT | {"tools": tools, "tool_choice": "none"})[0] == 200
    functions = {"functions": [{"name": "f"}], "function_call": "none"}
    assert post(server, "/v1/chat/completions", CHAT | functions)[0] == 200


def test_fields_that_ask_for_nothing_and_unknown_ones_pass(server: Server) -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "best_of": None,
        "logprobs": None,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "unheard_of": {"a": [1]},
        "metadata": {"a": "b"},
        "store": False,
        "priority": 1,
        "cache_salt": "x",
        "include_reasoning": True,
        "temperature": None,
        "max_tokens": None,
    }
    assert post(server, "/v1/completions", COMPLETION | neutral)[0] == 200
    assert post(server, "/v1/chat/completions", CHAT | neutral | {"logprobs": False, "top_logprobs": 0})[0] == 200


@pytest.mark.parametrize(
    ("value", "expected"), [(-3, -3), (0.25, 0), (10**30, 100), ("1", 0), ([[1]] * 1000, 0), (None, 0), ({}, 0)]
)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_a_priority_is_taken_or_ignored_and_never_refused(
    server: Server, path: str, body: dict[str, Any], value: object, expected: int
) -> None:
    while not server.core.received.empty():  # of other tests
        server.core.received.get_nowait()
    assert post(server, path, body | {"priority": value})[0] == 200
    assert server.core.expect(AddRequest).priority == expected
