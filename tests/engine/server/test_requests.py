"""Whatever a client sends, the answer is OpenAI's error body with the right status and the field's name."""

import gzip
import http.client
import json
import socket
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any

import openai
import pytest

from evenhand_engine.messages import AddRequest

from .conftest import WAIT_SECONDS, Say, Serve, Server, connect, token_ids


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(say("ok"), max_request_bytes=100_000)


def post(
    server: Server, path: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=20)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), dict(response.getheaders())
    finally:
        connection.close()


def error(server: Server, path: str, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, answer, headers = post(server, path, body)
    assert answer.keys() == {"error"}
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["message"]
    assert headers["X-Evenhand-Reason"] == answer["error"]["code"]
    return status, answer["error"]


COMPLETION = {"model": "tiny", "prompt": "x"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}


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


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b"\xff\xfe\x00",
        b"[" * 50_000,
        b'{"prompt": ' + b"[" * 50_000,
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x"} trailing',
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_malformed_bodies(server: Server, path: str, body: bytes) -> None:
    assert error(server, path, body)[0] == 400
    assert post(server, "/v1/completions", COMPLETION)[0] == 200, "the server goes on"


def test_a_number_without_end(server: Server) -> None:
    body = b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}"
    assert error(server, "/v1/completions", body)[1]["param"] == "max_tokens"


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip"])
def test_a_body_in_an_unknown_encoding_is_refused(server: Server, encoding: str) -> None:
    status, answer, _ = post(server, "/v1/completions", b"\x0b\x02\x80", {"Content-Encoding": encoding})
    assert (status, answer["error"]["code"]) == (415, "unsupported_encoding")
    assert "gzip, deflate, identity" in answer["error"]["message"]


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress])
def test_a_compressed_body_is_read(server: Server, compress: Callable[[bytes], bytes]) -> None:
    encoding = {"Content-Encoding": "gzip" if compress is gzip.compress else "deflate"}
    body = json.dumps(COMPLETION).encode()
    assert post(server, "/v1/completions", compress(body), encoding)[0] == 200
    assert post(server, "/v1/completions", compress(body)[:-5], encoding)[0] == 400


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [("/v1/completions", 4 << 30, b"HTTP/1.1 413"), ("/v1/completions", 25, b"HTTP/1.1 100 Continue")],
)
def test_leave_to_send_a_body_is_given_when_it_is_wanted(server: Server, path: str, size: int, status: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(64).startswith(status)
        if b"100" in status:
            connection.sendall(b'{"prompt":"x","stop":[]} ')
            assert connection.recv(64).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_body_that_is_not_what_its_header_says(server: Server, encoding: str) -> None:
    status, answer, _ = post(server, "/v1/completions", b"neither" * 9, {"Content-Encoding": encoding})
    assert (status, answer["error"]["code"]) == (400, "invalid_body")


def test_a_chat_that_the_model_has_no_token_for(server: Server) -> None:
    """A tokenizer may know more than the model: a padding token that was added without an embedding."""
    server.engine.tokenizer.vocab_size = 10
    assert error(server, "/v1/chat/completions", CHAT)[1]["param"] == "messages"
    assert error(server, "/v1/completions", COMPLETION)[1]["param"] == "prompt"


def test_a_declared_size_is_refused_before_it_comes(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n")
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_long_model_name_is_not_sent_back(server: Server) -> None:
    status, answer = error(server, "/v1/completions", COMPLETION | {"model": "m" * 90_000})
    assert (status, answer["code"]) == (404, "model_not_found")
    assert len(answer["message"]) < 400


def test_huge_body_is_a_413(server: Server) -> None:
    status, answer = error(server, "/v1/completions", {"prompt": "x" * 200_000})
    assert (status, answer["code"]) == (413, "request_too_large")


def test_compressed_bomb_is_a_413(server: Server) -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"x" * 50_000_000)
    assert len(bomb) < 100_000
    assert post(server, "/v1/completions", bomb, {"Content-Encoding": "gzip"})[0] == 413


def test_header_flood_is_refused(server: Server) -> None:
    host, port = urllib.parse.urlsplit(server.url).netloc.split(":")
    for flood in (b"X-A: " + b"a" * 100_000, b"\r\n".join(b"X-%d: a" % i for i in range(2000))):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + flood + b"\r\n\r\n")
            assert b" 400 " in connection.recv(1000).split(b"\r\n")[0]
    assert server.client().models.list().data


def test_prompt_beyond_the_context(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="tiny", prompt="word " * 1000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="tiny", prompt="x", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"


def test_unknown_routes_and_methods(server: Server) -> None:
    for path in ("/v1/embeddings", "/score", "/v2/rerank"):
        status, answer = error(server, path, {})
        assert (status, answer["code"]) == (404, "not_found") and "generates text" in answer["message"]
    assert error(server, "/v1/unheard/of", {})[0] == 404
    status, answer, headers = post(server, "/v1/models", {})
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert set(headers["Allow"].split(",")) == {"GET", "HEAD"}


@pytest.mark.parametrize(("path", "status"), [("/v1/unheard/of", b"404"), ("/v1/models", b"405")])
def test_no_leave_to_send_a_body_where_nothing_reads_it(server: Server, path: str, status: bytes) -> None:
    with connect(server) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 25\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2:3_X", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("a\tb", False), ("ü", False)],
)
def test_request_id(server: Server, given: str, kept: bool) -> None:
    status, answer, headers = post(server, "/v1/completions", COMPLETION, {"X-Request-Id": given})
    assert status == 200
    assert (headers["X-Request-Id"] == given) == kept
    assert answer["id"] == f"cmpl-{headers['X-Request-Id']}"


def test_content_parts_are_joined(server: Server) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for content in (parts, "one\ntwo"):
        post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    first, second = (token_ids(server.core.expect(AddRequest)) for _ in range(2))
    assert first == second


def test_continue_final_message(server: Server) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    body = {"messages": messages, "continue_final_message": True}
    assert post(server, "/v1/chat/completions", body)[0] == 200
    prompt = post(server, "/detokenize", {"tokens": token_ids(server.core.expect(AddRequest))})[1]["prompt"]
    assert prompt.endswith("<|im_start|>assistant\nOne, two,")


def test_tokenize_and_back(server: Server) -> None:
    text = "The capital — 東京"
    tokenized = post(server, "/tokenize", {"model": "tiny", "prompt": text, "return_token_strs": True})[1]
    assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
    assert tokenized["max_model_len"] == server.core.max_model_len
    assert post(server, "/detokenize", {"tokens": tokenized["tokens"]})[1] == {"prompt": text}
    chat = post(server, "/tokenize", {"messages": CHAT["messages"]})[1]
    post(server, "/v1/chat/completions", CHAT)
    assert token_ids(server.core.expect(AddRequest)) == chat["tokens"]


def test_tokenize_errors(server: Server) -> None:
    assert error(server, "/tokenize", {})[1]["param"] == "prompt"
    assert error(server, "/detokenize", {"tokens": [10**6]})[1]["param"] == "tokens"
    assert error(server, "/detokenize", {"tokens": ["a"]})[1]["param"] == "tokens"
    assert error(server, "/tokenize", {"model": "other", "prompt": "x"})[0] == 404


def test_probes(server: Server) -> None:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=20)
    for path in ("/health", "/ready", "/ping", "/version", "/metrics"):
        for method in ("GET", "HEAD"):
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200
            assert (body == b"") == (method == "HEAD" or path in ("/health", "/ready", "/ping"))
    connection.close()
