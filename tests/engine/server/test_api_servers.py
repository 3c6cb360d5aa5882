"""Two processes at the public port, one owner: what tenants share is counted once."""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from evenhand_engine.messages import AbortRequest, AddRequest
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .api_clients import HEADERS, Pinned, Stream, api_pids, ask, complete, metric, spoken, tenant, write_policy
from .conftest import Say, Serve, Server
from .policies import until
from .scripted_core import WAIT_SECONDS, ScriptedCore


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A directory with one tenant, without limits."""
    (tmp_path / "policies").mkdir()
    write_policy(tmp_path / "policies")
    return tmp_path / "policies"


@pytest.fixture
def pinned() -> Iterator[Pinned]:
    """`pinned(server)`: two clients of the tenant, each with a connection to a process of its own, which it keeps."""
    with contextlib.ExitStack() as stack:

        def connect_both(server: Server) -> list[httpx2.Client]:
            by_origin: dict[int, httpx2.Client] = {}
            for _ in range(100):
                client = stack.enter_context(httpx2.Client(base_url=server.url, timeout=WAIT_SECONDS))
                assert complete(client).status_code == 200, "the default tenant has no limits"
                client.headers.update(HEADERS)
                by_origin[server.core.origins[server.core.expect(AddRequest).request_id]] = client
                if len(by_origin) == 2:
                    return list(by_origin.values())
            pytest.fail("the kernel gives every connection to the same process")

        yield connect_both


@pytest.fixture
def open_streams() -> Iterator[Callable[[Server], list[Stream]]]:
    """`open_streams(server)`: two streams, one in each process."""
    opened: list[Stream] = []

    def open_both(server: Server) -> list[Stream]:
        by_origin: dict[int, Stream] = {}
        while len(by_origin) < 2:
            assert len(opened) < 100, "the kernel gives every connection to the same process"
            opened.append(Stream(server))
            by_origin[opened[-1].origin] = opened[-1]
        return list(by_origin.values())

    yield open_both
    for stream in opened:
        stream.close()


def test_a_quota_is_one_over_all_processes(serve: Serve, say: Say, policies: Path, pinned: Pinned) -> None:
    write_policy(policies, requestsPerMinute=6)
    server = serve(say("a b c d e f g"), policies=policies, api_server_count=2)
    clients, began_at = pinned(server), time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        parts = list(threads.map(lambda client: [complete(client) for _ in range(12)], clients))
    answers = [answer for part in parts for answer in part]
    counts = Counter(map(spoken, answers))
    assert set(counts) == {"ok", "requests_per_minute"}
    assert 6 <= counts["ok"] <= 6 + (time.monotonic() - began_at) / 10
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["x-ratelimit-limit-requests"] == "6"
    assert 1 <= int(refused.headers["Retry-After"]) <= 10
    assert tenant(server)["refusals"] == {"requests_per_minute": counts["requests_per_minute"]}


def test_a_request_that_outgrows_the_quota_is_ended(serve: Serve, policies: Path) -> None:
    """The owner follows what is computed, and says when nothing is left."""
    write_policy(policies, tokensPerMinute=600)
    core = ScriptedCore(max_model_len=4096)
    server = serve(core=core, policies=policies, api_server_count=2)
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(ask, server, max_tokens=None)
        request_id = core.expect(AddRequest).request_id
        other = threads.submit(ask, server, max_tokens=300)
        other_id = core.expect(AddRequest).request_id
        deadline = time.monotonic() + WAIT_SECONDS
        while core.received.empty():
            assert time.monotonic() < deadline
            core.output(RequestOutput(request_id=request_id, token_ids=(70,) * 8))
            time.sleep(0.002)
        abort = core.expect(AbortRequest)
        assert (abort.request_id, abort.reason) == (request_id, FinishReason.LENGTH)
        core.output(RequestOutput(request_id=other_id, finish_reason=FinishReason.LENGTH))
        used = answer.result(WAIT_SECONDS).json()["usage"]["completion_tokens"]
        assert other.result(WAIT_SECONDS).status_code == 200
    assert used >= 2 * 256, "as much as was expected, and once more"


def test_the_queue_is_one_over_all_processes(serve: Serve, policies: Path) -> None:
    """Nothing starts here, so what is admitted stays queued."""
    write_policy(policies, maxQueuedRequests=3)
    server = serve(policies=policies, api_server_count=2)
    with ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(ask, server) for _ in range(12)]
        queued = [server.core.expect(AddRequest).request_id for _ in range(3)]
        until(lambda: sum(answer.done() for answer in answers) == 9, "the others are refused")
        assert tenant(server)["inFlight"] == 3
        server.core.output(*(RequestOutput(request_id=name, finish_reason=FinishReason.LENGTH) for name in queued))
        counts = Counter(spoken(answer.result(WAIT_SECONDS)) for answer in answers)
    assert counts == {"ok": 3, "queue_full": 9}
    until(lambda: tenant(server)["inFlight"] == 0, "all are settled")


def test_the_memory_of_bodies_is_one_over_all_processes(
    serve: Serve, policies: Path, open_streams: Callable[[Server], list[Stream]]
) -> None:
    server = serve(policies=policies, api_server_count=2, max_tenant_body_bytes=1500)
    first, _ = open_streams(server)
    assert tenant(server)["bodyBytes"] > 0
    for _ in range(4):
        assert spoken(ask(server, prompt="y" * 1500)) == "body_bytes", "each process would have room for one"
    server.core.output(RequestOutput(request_id=first.request_id, finish_reason=FinishReason.LENGTH))


def test_metrics_are_of_all_processes_whichever_is_asked(
    serve: Serve, say: Say, policies: Path, pinned: Pinned
) -> None:
    server = serve(say("some words"), policies=policies, api_server_count=2)
    clients = pinned(server)
    before = metric(server.admin_url, "vllm:generation_tokens_total")
    answers = [complete(client, max_tokens=50).json() for client in (*clients, *clients)]
    num_tokens = before + sum(answer["usage"]["completion_tokens"] for answer in answers)
    for client in clients:
        assert complete(client, prompt=7).status_code == 400
        until(
            lambda client=client: metric(client, "vllm:generation_tokens_total") == num_tokens, "all tokens are counted"
        )
        until(lambda client=client: metric(client, "vllm:time_to_first_token_seconds_count") >= 6, "and all requests")
    until(lambda: metric(server.admin_url, "evenhand_refusals_total") == 2, "and refusals")


def test_a_policy_is_in_force_in_every_process(serve: Serve, say: Say, policies: Path, pinned: Pinned) -> None:
    server = serve(say("ok"), policies=policies, api_server_count=2)
    clients = pinned(server)
    assert [complete(client).status_code for client in clients] == [200, 200]
    write_policy(policies, key="another-key-of-the-same-tenant")
    until(lambda: all(complete(client).status_code == 401 for client in clients), "the old key is worth nothing")


def test_a_client_that_leaves_has_its_request_aborted(
    serve: Serve, policies: Path, open_streams: Callable[[Server], list[Stream]]
) -> None:
    server = serve(policies=policies, api_server_count=2)
    for stream in open_streams(server):
        server.core.output(RequestOutput(request_id=stream.request_id, token_ids=(70,)))
        assert stream.read_until(b"data: ")
        stream.close()
        abort = server.core.expect(AbortRequest)
        assert (abort.request_id, abort.reason) == (stream.request_id, FinishReason.ABORT)


def test_a_process_that_is_killed_takes_nothing_with_it(
    serve: Serve, policies: Path, open_streams: Callable[[Server], list[Stream]], caplog: pytest.LogCaptureFixture
) -> None:
    write_policy(policies, maxConcurrentRequests=1000, tokensPerMinute=100_000)
    server = serve(policies=policies, api_server_count=2)
    streams, before = open_streams(server), api_pids()
    server.core.output(*(RequestOutput(request_id=stream.request_id, token_ids=(70,)) for stream in streams))
    assert all(stream.read_until(b"data: ") for stream in streams)
    in_flight = tenant(server)["inFlight"]
    os.kill(min(before), signal.SIGKILL)
    until(lambda: tenant(server)["inFlight"] < in_flight, "what it held is given back")
    killed = server.core.expect(AbortRequest).request_id
    for stream in streams:
        server.core.output(
            RequestOutput(request_id=stream.request_id, token_ids=(70,), finish_reason=FinishReason.LENGTH)
        )
        assert stream.read_until(b"[DONE]") == (stream.origin != server.core.origins[killed])
    until(lambda: len(api_pids() - before) == 1, "another is started in its place")
    assert "an API server died" in caplog.text
    until(
        lambda: metric(server.admin_url, "evenhand_requests_total") == in_flight - tenant(server)["inFlight"],
        "what has ended is counted",
    )
    server.core.reply = lambda request: [
        RequestOutput(request_id=request.request_id, token_ids=(70,), finish_reason=FinishReason.LENGTH)
    ]
    server.core.origins.clear()
    until(lambda: ask(server).status_code == 200 and len(set(server.core.origins.values())) == 2, "both serve again")
    assert httpx2.get(f"{server.url}/ready").status_code == httpx2.get(f"{server.admin_url}/ready").status_code == 200
