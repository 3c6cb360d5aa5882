"""Tenants by their keys: quotas, limits of outputs, bodies and queues, suspension, audit; of the engine and a sidecar alike."""

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .conftest import Say, Serve, connect
from .policies import BATCH_KEY, CHAT_KEY, complete, pending, policy, samples, tenant, until, write, write_two
from .scripted_core import WAIT_SECONDS, ScriptedCore


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    return write_two(tmp_path)


def test_keys_name_tenants(serve: Serve, say: Say, policies: Path) -> None:
    server = serve(say("ok"), policies=policies)
    for key, tenant_id in ((CHAT_KEY, "chat"), (BATCH_KEY, "batch")):
        complete(server, key)
        assert server.core.expect(AddRequest).tenant_id == tenant_id
    assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 200
    assert server.core.expect(AddRequest).tenant_id == "default"
    with pytest.raises(openai.AuthenticationError) as caught:
        complete(server, "wrong")
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/completions", "/tokenize", "/detokenize", "/v1/completions/render"]
)
def test_no_anonymous(serve_either: Serve, say: Say, policies: Path, path: str) -> None:
    server = serve_either(say("ok"), policies=policies, anonymous=False)
    method = "GET" if path == "/v1/models" else "POST"
    assert httpx2.request(method, server.url + path).status_code == 401
    assert httpx2.get(f"{server.url}/health").status_code == 200
    assert server.client(api_key=CHAT_KEY).models.list().data


def test_shared_key(serve: Serve, say: Say, policies: Path) -> None:
    server = serve(say("ok"), policies=policies, api_key="shared")
    complete(server, "shared")
    assert server.core.expect(AddRequest).tenant_id == "default"
    complete(server, CHAT_KEY)
    assert server.core.expect(AddRequest).tenant_id == "chat"
    assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 401


def test_the_user_orders_requests_inside_the_tenant(serve: Serve, say: Say) -> None:
    server = serve(say("ok"))
    complete(server, "any", user="alice")
    assert server.core.expect(AddRequest).user == "alice"


def test_rate_limit_headers(serve_either: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 3, "tokensPerMinute": 1_000}))
    server = serve_either(say("ok"), policies=policies)
    headers = complete(server, CHAT_KEY, prompt=[3] * 200).headers
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "2"
    assert 0 < int(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 20
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert 700 < int(headers["x-ratelimit-remaining-tokens"]) < 1_000
    complete(server, CHAT_KEY)
    complete(server, CHAT_KEY)
    with pytest.raises(openai.RateLimitError) as caught:
        complete(server, CHAT_KEY)
    refused = caught.value.response
    assert refused.headers["X-Evenhand-Reason"] == caught.value.code == "requests_per_minute"
    assert 1 <= int(refused.headers["Retry-After"]) <= 20
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in refused.headers
    assert "x-ratelimit-limit-requests" not in complete(server, BATCH_KEY).headers
    assert tenant(server, "chat")["refusals"] == {"requests_per_minute": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/completions/render", {"prompt": "x"}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_what_only_tokenizes_counts_as_a_request(
    serve_either: Serve, say: Say, policies: Path, path: str, body: dict[str, Any]
) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 1}))
    server = serve_either(say("ok"), policies=policies)
    key = {"Authorization": f"Bearer {CHAT_KEY}"}
    assert [httpx2.post(server.url + path, json=body, headers=key).status_code for _ in range(2)] == [200, 429]


def test_quota_is_what_was_computed_though_the_client_has_left(serve: Serve, policies: Path) -> None:
    class Ahead(ScriptedCore):
        def ending(self, abort: AbortRequest) -> RequestOutput:
            return RequestOutput(request_id=abort.request_id, finish_reason=abort.reason, num_output_tokens=70)

    write(policies, "chat", policy("chat", CHAT_KEY, limits={"tokensPerMinute": 100}))
    server = serve(core=Ahead(), policies=policies)
    began_at = time.monotonic()
    with connect(server) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CHAT_KEY}\r\n"
        body = b'{"prompt": "x", "max_tokens": 90, "stream": true}'
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.core.output(RequestOutput(request_id=server.core.expect(AddRequest).request_id))
        assert b" 200 " in connection.recv(4096)
    until(lambda: tenant(server, "chat")["inFlight"] == 0, "the core has let go")
    remaining = tenant(server, "chat")["quota"]["tokens"]["remaining"]
    assert 25 <= remaining <= 30 + (time.monotonic() - began_at) * 100 / 60


def test_streams_carry_rate_limit_headers(serve_either: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 3}))
    server = serve_either(say("ok"), policies=policies)
    body = {"prompt": "x", "stream": True}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {CHAT_KEY}"})
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    assert answer.headers["X-Request-Id"]


async def test_a_hundred_at_once_do_not_overshoot(serve_either: Serve, policies: Path) -> None:
    """Each may use 50 tokens of 1,000 a minute; none ends before all have arrived."""
    limits = {"tokensPerMinute": 1_000}
    write(policies, "chat", policy("chat", CHAT_KEY, limits=limits))
    server = serve_either(policies=policies)

    def in_flight() -> int:
        return int(tenant(server, "chat")["inFlight"])

    async with server.async_client(api_key=CHAT_KEY) as client:
        tasks = [
            asyncio.create_task(client.completions.create(model="tiny", prompt=[3] * 40, max_tokens=10))
            for _ in range(100)
        ]
        started = time.monotonic()
        while (
            await asyncio.to_thread(in_flight) + sum(task.done() for task in tasks) < 100
        ):  # the refused ones are done
            assert time.monotonic() < started + WAIT_SECONDS
        seconds = time.monotonic() - started
        for _ in range(100 - sum(task.done() for task in tasks)):
            request = await asyncio.to_thread(server.core.expect, AddRequest)
            server.core.output(
                RequestOutput(request_id=request.request_id),
                RequestOutput(request_id=request.request_id, token_ids=(5,), finish_reason=FinishReason.STOP),
            )
        results = await asyncio.gather(*tasks, return_exceptions=True)
    admitted = [r for r in results if not isinstance(r, BaseException)]
    assert 20 <= len(admitted) <= 20 + math.ceil(seconds * 1_000 / 60 / 50)
    assert {r.code for r in results if isinstance(r, openai.RateLimitError)} == {"tokens_per_minute"}
    remaining = tenant(server, "chat")["quota"]["tokens"]["remaining"]
    assert remaining >= 1_000 - 41 * len(admitted), "what was reserved and not used is given back"


def test_output_limit_comes_from_the_policy(serve_either: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"maxOutputTokens": 20, "maxPromptTokens": 30}))
    server = serve_either(say("ok"), policies=policies)
    server.client(api_key=CHAT_KEY).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert server.core.expect(AddRequest).sampling_params.max_tokens == 20
    for options, code in (({"max_tokens": 21}, "max_output_tokens"), ({"prompt": [3] * 31}, "max_prompt_tokens")):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(server, CHAT_KEY, **options)
        assert caught.value.code == code
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_the_bodies_of_a_tenant_are_bounded(serve_either: Serve, policies: Path) -> None:
    """Those that have not come count as what they say or may become, those that have come as what they are."""
    server = serve_either(policies=policies, max_request_bytes=1000, max_tenant_body_bytes=1500)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CHAT_KEY}\r\n"
    with connect(server) as connection:
        connection.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"prompt": "x"'.encode())
        until(lambda: tenant(server, "chat")["bodyBytes"] == 1000, "the body that is coming is counted")
        with pytest.raises(openai.RateLimitError) as caught:
            complete(server, CHAT_KEY, prompt="y" * 600)
        assert caught.value.code == "body_bytes"
        assert caught.value.response.headers["Retry-After"] == "1"
        with pending(server, BATCH_KEY, 1), pending(server, CHAT_KEY, 1):
            assert 0 < tenant(server, "batch")["bodyBytes"] == tenant(server, "chat")["bodyBytes"] - 1000 < 200
    until(lambda: tenant(server, "chat")["bodyBytes"] == 0, "a client that left holds nothing")
    with connect(server) as connection:
        connection.sendall(f"{head}Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n".encode())
        until(lambda: tenant(server, "chat")["bodyBytes"] == 1000, "a compressed body may become the largest")
    until(lambda: tenant(server, "chat")["bodyBytes"] == 0, "a client that left holds nothing")
    with connect(server) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n".encode())
        until(lambda: tenant(server, "chat")["bodyBytes"] == 1000, "a body of unknown length may become the largest")
        connection.sendall(b'e\r\n"prompt": "x"}\r\n0\r\n\r\n')
        server.core.expect(AddRequest)
        assert 0 < tenant(server, "chat")["bodyBytes"] < 20, "of one token id, or as it came"


def test_queue_full(serve_either: Serve, policies: Path) -> None:
    limits = {"maxConcurrentRequests": 1, "maxQueuedRequests": 2}
    write(policies, "chat", policy("chat", CHAT_KEY, limits=limits))
    server = serve_either(policies=policies)
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(complete, server, CHAT_KEY) for _ in range(3)]
        until(lambda: tenant(server, "chat")["inFlight"] == 3, "all that may be are in flight")
        with pytest.raises(openai.RateLimitError) as caught:
            complete(server, CHAT_KEY)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert tenant(server, "chat")["refusals"] == {"queue_full": 1}
        for _ in answers:
            request_id = server.core.expect(AddRequest).request_id
            server.core.output(RequestOutput(request_id=request_id, token_ids=(5,), finish_reason=FinishReason.STOP))
        assert [answer.result(WAIT_SECONDS).status_code for answer in answers] == [200] * 3
    until(lambda: tenant(server, "chat")["inFlight"] == 0, "all are settled")


def test_refusals_for_a_full_queue_are_counted_by_vllms_name(serve: Serve, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"maxConcurrentRequests": 1, "maxQueuedRequests": 1}))
    server = serve(policies=policies)
    with pending(server, CHAT_KEY, 2):
        with pytest.raises(openai.RateLimitError):
            complete(server, CHAT_KEY)
        assert samples(server, public=True)["vllm:admission_rejections_total{reason=max_num_queued_reqs}"] == 1


def test_suspended(serve_either: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, suspend=True))
    server = serve_either(say("ok"), policies=policies)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        complete(server, CHAT_KEY)
    assert caught.value.code == "tenant_suspended"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_audit(serve_either: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 1}, enforcement="Audit"))
    server = serve_either(say("ok"), policies=policies)
    for _ in range(3):
        complete(server, CHAT_KEY)
    state = tenant(server, "chat")
    assert state["audited"] == {"requests_per_minute": 2}
    assert state["refusals"] == {}
    assert samples(server)["evenhand_audited_total{reason=requests_per_minute,tenant=chat}"] == 2
