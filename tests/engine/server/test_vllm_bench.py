"""`vllm bench serve` cannot be installed here: what it sends and reads, as of vLLM 0.32, see docs/testing.md."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import RequestOutput

from .conftest import Say, Serve, Server, connect
from .scripted_core import WAIT_SECONDS
from .test_faults import post

TEXT = "Paris, 東京."
COMMON: dict[str, Any] = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
COMPLETION = {"prompt": "Where?", "repetition_penalty": 1.0, "max_tokens": 7, "logprobs": None, **COMMON}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
CHAT = {"messages": MESSAGES, "max_completion_tokens": 7, **COMMON}
SAMPLING = {
    "ignore_eos": True,
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
}  # --ignore-eos, --temperature...


def chunks(server: Server, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Its events up to [DONE], as they come."""
    headers = {"Authorization": "Bearer none", "x-request-id": "bench-1"}
    with httpx2.stream("POST", f"{server.url}{path}", json=body, headers=headers, timeout=WAIT_SECONDS) as response:
        assert response.status_code == 200 and response.headers["X-Request-Id"] == "bench-1"
        for line in response.iter_lines():
            if line.removeprefix("data: ") not in ("", "[DONE]") and not line.startswith(":"):
                yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("more", [{}, SAMPLING])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_what_it_reads_is_there(serve: Serve, say: Say, path: str, body: dict[str, Any], more: dict[str, Any]) -> None:
    server = serve(say(TEXT))
    text, usage = "", {}
    for chunk in chunks(server, path, body | more):
        if choices := chunk["choices"]:
            text += (choices[0]["text"] if "text" in choices[0] else choices[0]["delta"].get("content")) or ""
        elif chunk.get("usage"):
            usage = chunk["usage"]
    assert text and TEXT.startswith(text)
    params = server.core.expect(AddRequest).sampling_params
    assert usage["completion_tokens"] == params.max_tokens == 7 and usage["prompt_tokens"] > 0
    assert (params.temperature == 0.0) == bool(more) and (not params.stop_token_ids) == bool(more)


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", COMPLETION | {"echo": True}), ("/v1/chat/completions", CHAT)]
)
def test_the_first_event_comes_with_the_first_token(serve: Serve, path: str, body: dict[str, Any]) -> None:
    """It takes the time to the first event with a choice for that to the first token."""
    server = serve()
    with connect(server) as connection:
        connection.sendall(post(path, json.dumps(body).encode()))
        request_id = server.core.expect(AddRequest).request_id
        server.core.output(RequestOutput(request_id=request_id))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        for _ in range(3):  # after these the server has sent what it had to send
            assert httpx2.get(f"{server.url}/health").status_code == 200
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        connection.setblocking(True)
        server.core.output(RequestOutput(request_id=request_id, token_ids=(70,)))
        assert b"data: " in connection.recv(4096)


def test_it_finds_the_model_and_the_server_ready(serve: Serve, say: Say) -> None:
    server = serve(say(TEXT))
    models = httpx2.get(f"{server.url}/v1/models").json()
    assert (models["data"][0]["id"], models["data"][0]["root"]) == ("tiny", "tiny")
    assert "vllm:" in httpx2.get(f"{server.url}/metrics").text
