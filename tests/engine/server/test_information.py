"""What the server says of itself, and of what a request would be computed from."""

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .conftest import Say, Serve, Server, connect
from .scripted_core import token_ids
from .test_faults import post

MESSAGES = [{"role": "user", "content": "Where?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def get(server: Server, path: str, **options: Any) -> httpx2.Response:
    return httpx2.get(f"{server.url}{path}", **options)


def ask(server: Server, path: str, body: dict[str, Any]) -> Any:
    answer = httpx2.post(f"{server.url}{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("count", [1, 2])
def test_the_load_is_what_is_in_flight(serve: Serve, count: int) -> None:
    server = serve(api_server_count=count)
    assert get(server, "/load").json() == {"server_load": 0}
    with connect(server) as first, connect(server) as second:
        for connection, prompts in ((first, ["x"]), (second, ["x", "y"])):
            connection.sendall(post("/v1/completions", json.dumps({"prompt": prompts}).encode()))
        requests = [server.core.expect(AddRequest) for _ in range(3)]
        assert get(server, "/load").json() == {"server_load": 3}
        for request in requests:
            server.core.output(RequestOutput(request_id=request.request_id, finish_reason=FinishReason.STOP))
        assert b" 200 " in first.recv(100) and b" 200 " in second.recv(100)
    assert get(server, "/load").json() == {"server_load": 0}


def test_the_settings(serve: Serve, say: Say) -> None:
    server = serve(say("x"), api_key="the-key", served_model_names=("a", "b"), reasoning_parser="qwen3")
    assert get(server, "/server_info").status_code == 401
    key = {"Authorization": "Bearer the-key"}
    told = get(server, "/server_info?config_format=json", headers=key).json()
    assert told["vllm_config"] == {
        "model_config": {"model": "tiny", "served_model_name": ["a", "b"], "max_model_len": 256, "dtype": "float32"},
        "cache_config": {"block_size": 16, "num_gpu_blocks": 64},
        "device_config": {"device": "cpu"},
        "tool_call_parser": "auto",
        "reasoning_parser": "qwen3",
    }
    assert set(told["system_env"]) == {"evenhand_version"} and told["vllm_env"] == {}
    text = get(server, "/server_info", headers=key).text
    assert "max_model_len=256" in text and "the-key" not in text
    wrong = get(server, "/server_info?config_format=xml", headers=key)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "config_format")


def test_a_chat_is_rendered_as_it_would_be_computed(speaking: Callable[..., Server]) -> None:
    server = speaking("x")
    body: dict[str, Any] = {
        "messages": MESSAGES,
        "tools": [WEATHER],
        "max_tokens": 7,
        "temperature": 0.5,
        "stop": "!",
        "seed": 3,
        "logit_bias": {"5": 1},
        "request_id": "r",
    }
    told = ask(server, "/v1/chat/completions/render", body)
    ask(server, "/v1/chat/completions", body)
    request = server.core.expect(AddRequest)
    params = request.sampling_params
    assert told["token_ids"] == token_ids(request)
    assert (told["request_id"], told["model"], told["features"], told["stream"]) == ("chatcmpl-r", "tiny", None, False)
    sampling = told["sampling_params"]
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "min_tokens"):
        assert sampling[name] == getattr(params, name), name
    assert sampling["stop_token_ids"] == sorted(params.stop_token_ids)
    assert (sampling["stop"], sampling["logit_bias"], sampling["n"]) == (["!"], {"5": 1.0}, 1)
    assert server.core.received.empty(), "the first was not computed"


def test_completions_are_rendered_each(serve: Serve, say: Say) -> None:
    told = ask(serve(say("x")), "/v1/completions/render", {"prompt": [[5, 6], [7]], "n": 2, "echo": True})
    assert [one["token_ids"] for one in told] == [[5, 6], [7]]
    assert {(one["sampling_params"]["max_tokens"], one["sampling_params"]["n"]) for one in told} == {(16, 2)}


def test_what_cannot_be_rendered_is_refused(serve: Serve, say: Say) -> None:
    answer = httpx2.post(f"{serve(say('x')).url}/v1/chat/completions/render", json={"messages": []})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_tools_are_tokenized_too(speaking: Callable[..., Server]) -> None:
    server = speaking("x")
    without = ask(server, "/tokenize", {"messages": MESSAGES})
    offered = ask(server, "/tokenize", {"messages": MESSAGES, "tools": [WEATHER], "return_token_strs": True})
    assert offered["count"] > without["count"] == len(without["tokens"]) and "token_strs" not in without
    ask(server, "/v1/chat/completions", {"messages": MESSAGES, "tools": [WEATHER], "max_tokens": 1})
    assert token_ids(server.core.expect(AddRequest)) == offered["tokens"]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/score", "/v1/score", "/rerank", "/v2/rerank", "/pooling"])
def test_what_other_models_do_is_said_to_be_theirs(serve: Serve, say: Say, path: str) -> None:
    answer = httpx2.post(f"{serve(say('x')).url}{path}", json={"input": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "this one generates text" in answer.json()["error"]["message"]
