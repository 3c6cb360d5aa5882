"""Tenants by policy files: identity, quotas, refusals, live reload, and what the admin port shows of it."""

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from evenhand_engine.errors import StartupError
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    Reconfigure,
    StepOutputs,
    TenantStats,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .conftest import WAIT_SECONDS, Say, ScriptedCore, Serve, Server, connect

CHAT_KEY, BATCH_KEY = "chat-key-0123456789-0123456789", "batch-key-0123456789-0123456789"


def policy(tenant: str, key: str | None = None, **spec: Any) -> list[dict[str, Any]]:
    identities: dict[str, Any] = {}
    documents: list[dict[str, Any]] = []
    if key is not None:
        secret = {"secretRef": {"name": f"{tenant}-key"}}
        identities = {"identities": [{"name": "key", "type": "APIKey", "apiKey": secret}]}
        documents = [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": f"{tenant}-key", "namespace": "default"},
                "stringData": {"key": key},
            }
        ]
    metadata = {"name": tenant, "namespace": "default"}
    body = {"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy", "metadata": metadata}
    return [*documents, body | {"spec": identities | spec}]


def write(directory: Path, name: str, documents: list[dict[str, Any]]) -> None:
    """Atomically, as editors and kubelets do."""
    hidden = directory / f".{name}.tmp"
    hidden.write_text(yaml.safe_dump_all(documents))
    hidden.rename(directory / f"{name}.yaml")


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    directory = tmp_path / "policies"
    directory.mkdir()
    write(directory, "chat", policy("chat", CHAT_KEY, weight=4))
    write(directory, "batch", policy("batch", BATCH_KEY, latencyClass="Batch"))
    return directory


def admin(server: Server, path: str) -> Any:
    return httpx2.get(server.admin_url + path, timeout=WAIT_SECONDS).raise_for_status().json()


def tenant(server: Server, tenant_id: str) -> dict[str, Any]:
    (found,) = [t for t in admin(server, "/v1/tenants")["tenants"] if t["tenantId"] == tenant_id]
    return dict(found)


def samples(server: Server, path: str = "/metrics", *, public: bool = False) -> dict[str, float]:
    """Metrics as `name{label=value,...}` without the constant labels."""
    text = httpx2.get((server.url if public else server.admin_url) + path, timeout=WAIT_SECONDS).text
    constant = {"model_name", "engine"}
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()) if k not in constant)}}}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_SECONDS} s: {what}"
        time.sleep(0.01)


def until_count(server: Server, name: str, value: float) -> None:
    until(lambda: samples(server).get(name) == value, f"{name} is {value}")


def complete(server: Server, key: str, **options: Any) -> Any:
    return server.client(api_key=key).completions.with_raw_response.create(
        **{"model": "tiny", "prompt": "x", "max_tokens": 5} | options
    )


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
def test_no_anonymous(serve: Serve, say: Say, policies: Path, path: str) -> None:
    server = serve(say("ok"), policies=policies, anonymous=False)
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


def test_rate_limit_headers(serve: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 3, "tokensPerMinute": 10_000}))
    server = serve(say("ok"), policies=policies)
    headers = complete(server, CHAT_KEY).headers
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "2"
    assert 0 < int(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 20
    assert headers["x-ratelimit-limit-tokens"] == "10000"
    assert 9_900 < int(headers["x-ratelimit-remaining-tokens"]) < 10_000
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
    serve: Serve, say: Say, policies: Path, path: str, body: dict[str, Any]
) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 1}))
    server = serve(say("ok"), policies=policies)
    key = {"Authorization": f"Bearer {CHAT_KEY}"}
    assert [httpx2.post(server.url + path, json=body, headers=key).status_code for _ in range(2)] == [200, 429]


def test_quota_is_what_was_computed_though_the_client_has_left(serve: Serve, policies: Path) -> None:
    class Ahead(ScriptedCore):
        def ending(self, abort: AbortRequest) -> RequestOutput:
            return RequestOutput(request_id=abort.request_id, finish_reason=abort.reason, num_output_tokens=70)

    write(policies, "chat", policy("chat", CHAT_KEY, limits={"tokensPerMinute": 100}))
    server = serve(core=Ahead(), policies=policies)
    with connect(server) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {CHAT_KEY}\r\n"
        body = b'{"prompt": "x", "max_tokens": 90, "stream": true}'
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.core.output(RequestOutput(request_id=server.core.expect(AddRequest).request_id))
        assert b" 200 " in connection.recv(4096)
    until(lambda: tenant(server, "chat")["inFlight"] == 0, "the core has let go")
    assert 25 <= tenant(server, "chat")["quota"]["tokens"]["remaining"] <= 40


def test_streams_carry_rate_limit_headers(serve: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 3}))
    server = serve(say("ok"), policies=policies)
    body = {"prompt": "x", "stream": True}
    answer = httpx2.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {CHAT_KEY}"})
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    assert answer.headers["X-Request-Id"]


async def test_a_hundred_at_once_do_not_overshoot(serve: Serve, policies: Path) -> None:
    """Each may use 50 tokens of 1,000 a minute; none ends before all have arrived."""
    limits = {"tokensPerMinute": 1_000}
    write(policies, "chat", policy("chat", CHAT_KEY, limits=limits))
    server = serve(policies=policies)
    async with server.async_client(api_key=CHAT_KEY) as client:
        tasks = [
            asyncio.create_task(client.completions.create(model="tiny", prompt=[3] * 40, max_tokens=10))
            for _ in range(100)
        ]
        started = time.monotonic()
        while sum(task.done() for task in tasks) < 79:  # the refused ones
            await asyncio.sleep(0.01)
            assert time.monotonic() < started + WAIT_SECONDS
        await asyncio.sleep(0)
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


def test_output_limit_comes_from_the_policy(serve: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"maxOutputTokens": 20, "maxPromptTokens": 30}))
    server = serve(say("ok"), policies=policies)
    server.client(api_key=CHAT_KEY).chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert server.core.expect(AddRequest).sampling_params.max_tokens == 20
    for options, code in (({"max_tokens": 21}, "max_output_tokens"), ({"prompt": [3] * 31}, "max_prompt_tokens")):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(server, CHAT_KEY, **options)
        assert caught.value.code == code
        assert caught.value.response.headers["x-should-retry"] == "false"


@contextlib.contextmanager
def pending(server: Server, key: str, count: int) -> Iterator[list[AddRequest]]:
    """Requests that the core has received and not answered; they are ended on leaving."""
    threads = [threading.Thread(target=complete, args=(server, key)) for _ in range(count)]
    for thread in threads:
        thread.start()
    requests = [server.core.expect(AddRequest) for _ in threads]
    try:
        yield requests
    finally:
        for request in requests:
            server.core.output(
                RequestOutput(request_id=request.request_id, token_ids=(5,), finish_reason=FinishReason.STOP)
            )
        for thread in threads:
            thread.join(WAIT_SECONDS)


def test_the_bodies_of_a_tenant_are_bounded(serve: Serve, policies: Path) -> None:
    """Those that have not come count as what they say or may become, those that have come as what they are."""
    server = serve(policies=policies, max_request_bytes=1000, max_tenant_body_bytes=1500)
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
        assert tenant(server, "chat")["bodyBytes"] == 4, "of one token id"


def test_queue_full(serve: Serve, policies: Path) -> None:
    limits = {"maxConcurrentRequests": 1, "maxQueuedRequests": 2}
    write(policies, "chat", policy("chat", CHAT_KEY, limits=limits))
    server = serve(policies=policies)
    with pending(server, CHAT_KEY, 3):
        assert tenant(server, "chat")["inFlight"] == 3
        with pytest.raises(openai.RateLimitError) as caught:
            complete(server, CHAT_KEY)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        rejections = samples(server, public=True)["vllm:admission_rejections_total{reason=max_num_queued_reqs}"]
        assert rejections == 1
    assert tenant(server, "chat")["inFlight"] == 0


def test_suspended(serve: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, suspend=True))
    server = serve(say("ok"), policies=policies)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        complete(server, CHAT_KEY)
    assert caught.value.code == "tenant_suspended"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_audit(serve: Serve, say: Say, policies: Path) -> None:
    write(policies, "chat", policy("chat", CHAT_KEY, limits={"requestsPerMinute": 1}, enforcement="Audit"))
    server = serve(say("ok"), policies=policies)
    for _ in range(3):
        complete(server, CHAT_KEY)
    state = tenant(server, "chat")
    assert state["audited"] == {"requests_per_minute": 2}
    assert state["refusals"] == {}
    assert samples(server)["evenhand_audited_total{reason=requests_per_minute,tenant=chat}"] == 2


def test_reload_is_live_and_loses_no_request(serve: Serve, policies: Path) -> None:
    server = serve(policies=policies)
    before = admin(server, "/v1/scheduler-config")
    assert before["source"] == "Files"
    server.core.expect(Reconfigure)
    with pending(server, CHAT_KEY, 1):
        write(policies, "chat", policy("chat", "another-key-0123456789-0123456789", weight=9))
        config = server.core.expect(Reconfigure).config
        assert {t.tenant_id: t.weight for t in config.tenants} == {"batch": 1, "chat": 9}
        with pytest.raises(openai.AuthenticationError):
            complete(server, CHAT_KEY)
    after = admin(server, "/v1/scheduler-config")
    assert after["digest"] == config.digest() != before["digest"]
    assert [t["weight"] for t in after["config"]["tenants"]] == [1, 9]
    assert samples(server)["evenhand_config_reloads_total{result=applied}"] == 1


def test_a_key_is_rotated_without_a_gap(serve: Serve, say: Say, policies: Path) -> None:
    """Both are good for a while, then only the new one."""
    server, new_key = serve(say("ok"), policies=policies), "the-next-key-0123456789-0123456789"
    secret, chat = policy("chat", CHAT_KEY)

    def keys_of_chat() -> int:
        tenants = admin(server, "/v1/scheduler-config")["config"]["tenants"]
        return sum(len(each["keyHashes"]) for each in tenants if each["tenantId"] == "chat")

    write(policies, "chat", [secret | {"stringData": {"current": CHAT_KEY, "next": new_key}}, chat])
    until(lambda: keys_of_chat() == 2, "the new key is known")
    for key in (CHAT_KEY, new_key):
        complete(server, key)
        assert server.core.expect(AddRequest).tenant_id == "chat"
    write(policies, "chat", [secret | {"stringData": {"next": new_key}}, chat])
    until(lambda: keys_of_chat() == 1, "the old key is gone")
    complete(server, new_key)
    with pytest.raises(openai.AuthenticationError):
        complete(server, CHAT_KEY)


def test_a_bad_file_keeps_the_last_good_config_and_says_so(
    serve: Serve, say: Say, policies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(say("ok"), policies=policies)
    good = admin(server, "/v1/scheduler-config")
    write(policies, "batch", [{"kind": "TenantPolicy", "apiVersion": "evenhand.dev/v1alpha1", "spec": {"weight": -1}}])
    until(lambda: admin(server, "/v1/scheduler-config")["error"] is not None, "the rejection is shown")
    state = admin(server, "/v1/scheduler-config")
    assert state["digest"] == good["digest"]
    assert "batch.yaml" in state["error"]
    assert state["rejectedAt"] > state["appliedAt"]
    metrics = samples(server)
    assert metrics["evenhand_config_current{}"] == 0
    assert metrics["evenhand_config_reloads_total{result=rejected}"] == 1
    assert any("config rejected" in record.message for record in caplog.records)
    complete(server, BATCH_KEY)
    write(policies, "batch", policy("batch", BATCH_KEY, latencyClass="Batch"))
    until(lambda: admin(server, "/v1/scheduler-config")["error"] is None, "the repair is noticed")
    assert samples(server)["evenhand_config_current{}"] == 1


def test_configmap_links_are_followed(serve: Serve, say: Say, tmp_path: Path) -> None:
    """The kubelet writes a new folder and moves the link `..data` to it."""
    directory = tmp_path / "mount"
    for version, key in (("..one", CHAT_KEY), ("..two", BATCH_KEY)):
        (directory / version).mkdir(parents=True)
        write(directory / version, "chat", policy("chat", key))
    (directory / "..data").symlink_to("..one")
    (directory / "chat.yaml").symlink_to("..data/chat.yaml")
    server = serve(say("ok"), policies=directory)
    complete(server, CHAT_KEY)
    server.core.expect(Reconfigure)
    (directory / "..next").symlink_to("..two")
    os.replace(directory / "..next", directory / "..data")
    server.core.expect(Reconfigure)
    complete(server, BATCH_KEY)


def test_the_directory_may_be_replaced_as_a_whole(serve: Serve, say: Say, policies: Path) -> None:
    server = serve(say("ok"), policies=policies)
    server.core.expect(Reconfigure)
    for weight in (7, 8):
        fresh = policies.with_name("fresh")
        fresh.mkdir()
        write(fresh, "chat", policy("chat", CHAT_KEY, weight=weight))
        policies.rename(policies.with_name(f"old-{weight}"))
        fresh.rename(policies)
        while [t.weight for t in server.core.expect(Reconfigure).config.tenants] != [weight]:
            pass  # a moment without the directory may have been seen


def test_bad_policies_at_start_are_a_start_up_error(serve: Serve, say: Say, policies: Path) -> None:
    (policies / "bad.yaml").write_text("kind: TenantPolicy\n  weight: [")
    with pytest.raises(StartupError, match=r"bad\.yaml"):
        serve(say("ok"), policies=policies)
    with pytest.raises(StartupError, match="missing"):
        serve(say("ok"), policies=policies / "missing")


def test_no_key_is_shown_anywhere(serve: Serve, say: Say, policies: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server = serve(say("ok"), policies=policies, api_key="a-shared-secret")
    complete(server, CHAT_KEY, prompt="a private prompt")
    with pytest.raises(openai.AuthenticationError):
        complete(server, "a-mistyped-secret")
    write(policies, "chat", policy("chat", CHAT_KEY, weight=5000))
    until(lambda: admin(server, "/v1/scheduler-config")["error"] is not None, "the rejection is shown")
    pages = [httpx2.get(server.admin_url + path).text for path in ("/metrics", "/v1/tenants", "/v1/scheduler-config")]
    ours = [r for r in caplog.records if r.name.startswith(("evenhand", "aiohttp"))]
    shown = "\n".join([*pages, *(f"{r.getMessage()} {getattr(r, 'fields', '')}" for r in ours)])
    assert "request" in shown
    for secret in (CHAT_KEY, BATCH_KEY, "a-shared-secret", "a-mistyped-secret", "a private prompt"):
        assert secret not in shown


def stats(*tenants: TenantStats, step_id: int = 1) -> StepOutputs:
    return StepOutputs(
        outputs=(),
        stats=EngineStats(
            time=float(step_id),
            step_id=step_id,
            num_running=2,
            num_waiting=5,
            num_deferred=2,
            num_kv_blocks=100,
            num_free_kv_blocks=75,
            num_preemptions=3,
            num_prefix_queries=50,
            num_prefix_hits=20,
            num_drafts=4,
            num_draft_tokens=9,
            num_accepted_tokens=6,
            virtual_time=0.0,
            config_digest="sha256:x",
            step_tokens=(5, 7),
            step_seconds=(0.1, 0.1),
            tenants=tenants,
        ),
    )


def tenant_stats(tenant_id: str, service: int) -> TenantStats:
    return TenantStats(
        tenant_id=tenant_id,
        num_running=1,
        num_waiting=2,
        num_kv_blocks=10,
        service=service,
        virtual_service=0.0,
        ahead=0.5,
        lag=1.5,
        lag_bound=4000.0,
        num_preemptions=1,
        num_prompt_tokens=100,
        num_generation_tokens=50,
    )


def test_metrics_of_requests(serve: Serve, say: Say, policies: Path) -> None:
    server = serve(say("some words"), policies=policies)
    answer = complete(server, CHAT_KEY, prompt="one two three", max_tokens=50).parse()
    with pytest.raises(openai.AuthenticationError):
        complete(server, "wrong")
    metrics = samples(server)
    assert metrics["vllm:prompt_tokens_total{}"] == answer.usage.prompt_tokens
    assert metrics["vllm:generation_tokens_total{}"] == answer.usage.completion_tokens
    assert metrics["vllm:request_success_total{finished_reason=stop}"] == 1
    assert metrics["vllm:time_to_first_token_seconds_count{}"] == 1
    assert metrics["vllm:e2e_request_latency_seconds_count{}"] == 1
    assert metrics["vllm:request_queue_time_seconds_count{}"] == 1
    assert metrics["vllm:request_generation_tokens_sum{}"] == answer.usage.completion_tokens
    assert metrics["evenhand_requests_total{outcome=finished,reason=stop,tenant=chat}"] == 1
    assert metrics["evenhand_tokens_total{kind=prompt,tenant=chat}"] == answer.usage.prompt_tokens
    assert metrics["evenhand_tokens_total{kind=cached,tenant=chat}"] == 3
    assert metrics["evenhand_refusals_total{reason=invalid_api_key,tenant=none}"] == 1
    assert not any(name.endswith("_created{}") for name in metrics)


def test_times_between_tokens_are_those_of_their_arrival(serve: Serve) -> None:
    """Tokens that come together, or before the last ones were looked at, have no time between them."""
    server = serve()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connect(server))
        body = b'{"prompt": "x", "max_tokens": 9}'
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        request_id = server.core.expect(AddRequest).request_id
        for token_ids, total in (((70,), 1), ((70, 70), 3), ((70, 70, 70), 6)):
            server.core.output(RequestOutput(request_id=request_id, token_ids=token_ids))
            until_count(server, "evenhand_tokens_total{kind=generation,tenant=default}", total)
        assert samples(server)["evenhand_inter_token_latency_seconds_count{tenant=default}"] == 2


def test_metrics_of_the_engine(serve: Serve, policies: Path) -> None:
    core = ScriptedCore()
    server = serve(core=core, policies=policies)
    core.send(stats(tenant_stats("chat", 300), tenant_stats("batch", 100)))
    core.send(stats(tenant_stats("chat", 600), step_id=2))
    until(lambda: samples(server).get("vllm:iteration_tokens_total_count{}") == 4, "both reports have arrived")
    metrics = samples(server)
    assert metrics["vllm:num_requests_running{}"] == 2
    assert metrics["vllm:num_requests_waiting{}"] == 5
    assert metrics["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 3
    assert metrics["vllm:num_requests_waiting_by_reason{reason=deferred}"] == 2
    assert metrics["vllm:kv_cache_usage_perc{}"] == 0.25
    assert metrics["vllm:num_preemptions_total{}"] == 3
    assert metrics["evenhand_service_lag{tenant=chat}"] == 1.5
    assert metrics["evenhand_service_lag_bound{tenant=batch}"] == 4000
    rows = {row["tenantId"]: row for row in admin(server, "/v1/tenants")["tenants"]}
    assert (rows["chat"]["lag"], rows["chat"]["lagBound"]) == (1.5, 4000)
    assert metrics["vllm:prefix_cache_hits_total{}"] == 20
    assert metrics["vllm:spec_decode_num_drafts_total{}"] == 4
    assert metrics["vllm:spec_decode_num_draft_tokens_total{}"] == 9
    assert metrics["vllm:spec_decode_num_accepted_tokens_total{}"] == 6
    assert metrics["evenhand_kv_blocks{tenant=batch}"] == 10
    assert metrics["evenhand_service_total{tenant=chat}"] == 600
    assert metrics["evenhand_attained_share{tenant=chat}"] == pytest.approx(6 / 7, abs=0.01)
    assert metrics["evenhand_entitled_share{tenant=chat}"] == pytest.approx(4 / 5, abs=0.01)
    chat = tenant(server, "chat")
    assert (chat["running"], chat["waiting"], chat["kvBlocks"], chat["service"]) == (1, 2, 10, 600)
    assert chat["attainedShare"] == pytest.approx(6 / 7, abs=0.01)
    assert admin(server, "/v1/scheduler-config")["engineDigest"] == "sha256:x"


def test_a_deleted_tenant_leaves_no_ghost(serve: Serve, policies: Path) -> None:
    core = ScriptedCore()
    server = serve(core=core, policies=policies)
    core.send(stats(tenant_stats("chat", 300), tenant_stats("batch", 100)))
    core.send(stats(tenant_stats("chat", 600), step_id=2))
    until(lambda: "evenhand_running_requests{tenant=batch}" in samples(server), "both are seen")
    gone = stats(tenant_stats("chat", 900), step_id=3)
    core.send(msgspec.structs.replace(gone, stats=msgspec.structs.replace(gone.stats, retired_tenants=("batch",))))
    until(lambda: "evenhand_running_requests{tenant=batch}" not in samples(server), "one is gone")
    assert samples(server)["evenhand_attained_share{tenant=chat}"] == 1, "what it got lately is no part of the whole"


def test_the_public_port_says_nothing_of_tenants(serve: Serve, say: Say, policies: Path) -> None:
    server = serve(say("ok"), policies=policies)
    complete(server, CHAT_KEY)
    public = samples(server, public=True)
    assert public["vllm:generation_tokens_total{}"] > 0
    assert not any("chat" in name or "evenhand" in name for name in public)
    for path in ("/v1/tenants", "/v1/scheduler-config"):
        assert httpx2.get(server.url + path).status_code == 404


def test_admin_answers_to_addresses_only(serve: Serve, say: Say) -> None:
    server = serve(say("ok"))
    assert httpx2.get(f"{server.admin_url}/v1/tenants", headers={"Host": "evil.example"}).status_code == 403
    assert httpx2.get(f"{server.admin_url}/metrics", headers={"Host": "evil.example"}).status_code == 200
