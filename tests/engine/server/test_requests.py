"""Requests as HTTP: bodies, encodings, sizes, routes, ids, probes."""

import gzip
import http.client
import json
import socket
import urllib.parse
import zlib
from collections.abc import Callable

import openai
import pytest

from evenhand_engine.messages import AddRequest

from .conftest import Say, Serve, Server, connect
from .posting import CHAT, COMPLETION, error, post
from .scripted_core import WAIT_SECONDS, token_ids


@pytest.fixture
def server(serve: Serve, say: Say) -> Server:
    return serve(say("ok"), max_request_bytes=100_000)


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


@pytest.mark.parametrize("coding", ["gzip, chunked", "gzip,chunked", "identity, chunked"])
def test_a_body_in_an_unknown_transfer_coding_is_not_implemented(server: Server, coding: str) -> None:
    body = b"{}"
    with connect(server) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {coding}\r\n\r\n"
        connection.sendall(head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert connection.recv(64).startswith(b"HTTP/1.1 501")


@pytest.mark.parametrize("text", ['"\\ud800"', '"a \\udc00"', '"\\ud83d b"'])
def test_half_of_a_surrogate_pair_is_not_taken_for_a_body_that_is_cut(server: Server, text: str) -> None:
    status, detail = error(server, "/v1/completions", b'{"prompt": %b}' % text.encode())
    assert (status, detail["code"]) == (400, "invalid_json")
    assert "is malformed" in detail["message"]
    assert "truncated" in error(server, "/v1/completions", b'{"prompt": "x')[1]["message"]


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


@pytest.mark.parametrize("key", ["", "Authorization: Bearer wrong\r\n"])
def test_no_leave_to_send_four_gigabytes_without_a_credential(serve: Serve, say: Say, key: str) -> None:
    """The final status comes first, and the credential's before the size's."""
    with connect(serve(say("ok"), api_key="the-key")) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\n{key}Expect: 100-continue\r\n"
        connection.sendall(f"{head}Content-Length: {4 << 30}\r\n\r\n".encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 401")


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
        with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as connection:
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
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=WAIT_SECONDS)
    for path in ("/health", "/ready", "/ping", "/version", "/metrics"):
        for method in ("GET", "HEAD"):
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200
            assert (body == b"") == (method == "HEAD" or path in ("/health", "/ready", "/ping"))
    connection.close()


def test_only_so_much_is_tokenized_for_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_engine.openai.tokens._MAX_TOKENS", 300)
    assert post(server, "/tokenize", {"prompt": "x " * 100})[1]["count"] == 200
    status, answer = error(server, "/tokenize", {"prompt": "x " * 400})
    assert (status, answer["code"], answer["param"]) == (400, "context_length_exceeded", "prompt")
    assert "up to 300 tokens" in answer["message"]


def test_a_prompt_cut_to_more_than_the_context_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes alone, as one that is not cut."""
    monkeypatch.setattr(server.engine.tokenizer, "encode_end", None)
    body = COMPLETION | {"prompt": "x " * 400, "truncate_prompt_tokens": 100_000}
    assert error(server, "/v1/completions", body)[1]["code"] == "context_length_exceeded"


def test_only_so_many_tokens_become_text(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_engine.openai.tokens._MAX_TOKENS", 300)
    assert post(server, "/detokenize", {"tokens": [70] * 300})[0] == 200
    assert error(server, "/detokenize", {"tokens": [70] * 301})[1]["param"] == "tokens"
