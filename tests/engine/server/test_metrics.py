"""Metrics of requests and of the engine, and who is told what."""

import contextlib
from pathlib import Path

import httpx2
import msgspec
import openai
import pytest

from evenhand_engine.messages import (
    AddRequest,
    EngineStats,
    StepOutputs,
    TenantStats,
)
from evenhand_engine.scheduler.request import RequestOutput
from harness.stats import make_tenant_stats

from .conftest import Say, Serve, connect
from .policies import CHAT_KEY, admin, complete, samples, tenant, until, until_count, write_two
from .scripted_core import ScriptedCore


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    return write_two(tmp_path)


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
    return make_tenant_stats(
        tenant_id,
        num_waiting=2,
        num_kv_blocks=10,
        service=service,
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
