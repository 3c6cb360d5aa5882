"""What goes wrong on either side of the server: clients that leave, stall or send garbage, an engine that dies."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

import evenhand_engine.frontend.requests as server_requests
from evenhand_engine.logs import LineFormatter
from evenhand_engine.messages import AbortRequest, AddRequest, EngineFailed
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

from .conftest import Say, Serve, Server, connect
from .policies import until
from .scripted_core import WAIT_SECONDS, ScriptedCore


def post(path: str, body: bytes, *, length: int | None = None, headers: str = "") -> bytes:
    length = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


def until_healthy(server: Server, healthy: bool) -> httpx2.Response:
    deadline = time.monotonic() + WAIT_SECONDS
    while (answer := httpx2.get(f"{server.url}/health")).is_success != healthy:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_client_gone_aborts_the_request(serve: Serve, stream: bool, started: bool) -> None:
    server = serve()
    with connect(server) as connection:
        connection.sendall(post("/v1/completions", json.dumps({"prompt": "x", "stream": stream}).encode()))
        request = server.core.expect(AddRequest)
        if started:
            server.core.output(RequestOutput(request_id=request.request_id, token_ids=(5,)))
            if stream:
                connection.recv(100)
    assert server.core.expect(AbortRequest).request_id == request.request_id
    until_none_in_flight(server)


def until_none_in_flight(server: Server) -> None:
    def is_idle() -> bool:
        return not httpx2.get(f"{server.admin_url}/v1/tenants").json()["tenants"][0]["inFlight"]

    until(is_idle, "nothing is in flight")


def test_client_gone_aborts_all_prompts(serve: Serve) -> None:
    server = serve()
    with connect(server) as connection:
        connection.sendall(post("/v1/completions", json.dumps({"prompt": ["a", "b", "c"], "stream": True}).encode()))
        sent = {server.core.expect(AddRequest).request_id for _ in range(3)}
    assert {server.core.expect(AbortRequest).request_id for _ in range(3)} == sent


def test_one_refused_prompt_ends_the_others(serve: Serve) -> None:
    server = serve()
    errors: list[openai.APIStatusError] = []

    def ask() -> None:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            server.client().completions.create(model="tiny", prompt=["a", "b"])
        errors.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    first, second = (server.core.expect(AddRequest).request_id for _ in range(2))
    server.core.output(RequestOutput(request_id=first, finish_reason=FinishReason.TENANT_SUSPENDED))
    assert server.core.expect(AbortRequest).request_id == second
    thread.join(WAIT_SECONDS)
    assert errors[0].code == "tenant_suspended"


def test_a_slow_reader_delays_nobody(serve: Serve, say: Say) -> None:
    """It asks for far more than the socket's buffers hold, and reads nothing."""
    core = ScriptedCore(max_model_len=40_000)

    def reply(request: AddRequest) -> Iterator[RequestOutput]:
        return iter(say("word " * (30_000 if request.sampling_params.max_tokens > 100 else 2))(request))

    core.reply = reply
    server = serve(core=core)
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {"prompt": "x", "stream": True, "max_tokens": 30_000, "stop": ["\0"]}
        connection.sendall(post("/v1/completions", json.dumps(body).encode()))
        core.expect(AddRequest)
        for _ in range(5):
            answer = server.client().completions.create(model="tiny", prompt="x", max_tokens=50)
            assert answer.choices[0].text == "word word "


def test_a_client_that_never_reads_is_ended_and_counted(serve: Serve) -> None:
    server = serve(write_timeout=0.2, served_model_names=("m" * 20_000,))  # which every event carries
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {"prompt": "x", "stream": True, "max_tokens": 200}
        connection.sendall(post("/v1/completions", json.dumps(body).encode()))
        request_id = server.core.expect(AddRequest).request_id
        deadline = time.monotonic() + WAIT_SECONDS
        while server.core.received.empty():
            assert time.monotonic() < deadline
            server.core.output(RequestOutput(request_id=request_id, token_ids=(70,)))
            time.sleep(0.002)
        assert server.core.expect(AbortRequest).reason is FinishReason.ABORT
    until_metric(server, 'evenhand_stalled_clients_total{tenant="default"} 1.0')
    until_metric(server, 'evenhand_requests_total{outcome="aborted",reason="client_gone",tenant="default"} 1.0')
    until_none_in_flight(server)


def until_metric(server: Server, line: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while line not in httpx2.get(f"{server.admin_url}/metrics").text:
        assert time.monotonic() < deadline, line
        time.sleep(0.01)


@pytest.mark.parametrize("refused", [False, True])
def test_a_stream_that_waits_sends_comments(serve: Serve, refused: bool) -> None:
    """On request, since a refusal in the queue can then be an event only."""
    server = serve(queue_heartbeat=0.05)
    with connect(server) as connection, connection.makefile("rb") as lines:
        connection.sendall(post("/v1/completions", json.dumps({"prompt": "x", "stream": True}).encode()))
        request_id = server.core.expect(AddRequest).request_id
        assert b" 200 " in next(lines)
        beats = [line for line in (next(lines) for _ in range(40)) if line == b": waiting\n"]
        assert len(beats) > 2
        reason = FinishReason.QUEUE_TIMEOUT if refused else FinishReason.LENGTH
        token_ids = () if refused else (70,)
        server.core.output(RequestOutput(request_id=request_id, token_ids=token_ids, finish_reason=reason))
        event = next(line for line in lines if line.startswith(b"data: "))
        assert (b"queue_timeout" in event) == refused
        assert any(line == b"data: [DONE]\n" for line in lines)


def test_a_body_that_never_comes_is_a_408(serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_requests, "_BODY_TIMEOUT_SECONDS", 0.05)
    with connect(serve(say("ok"))) as connection:
        connection.sendall(post("/v1/completions", b'{"pro', length=1000))
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_body_is_not_read_before_the_key_is_checked(serve: Serve, say: Say) -> None:
    with connect(serve(say("ok"), anonymous=False)) as connection:
        connection.sendall(post("/v1/completions", b'{"pro', length=10**9))
        assert b" 401 " in connection.recv(4096).split(b"\r\n")[0]


def test_malformed_http_does_not_end_the_server(serve: Serve, say: Say) -> None:
    server = serve(say("ok"))
    for garbage in (
        b"\x16\x03\x01\x02\x00" * 10,
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    ):
        with connect(server) as connection:
            connection.sendall(garbage)
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.0 400 ") and b"\r\nContent-Type: application/json\r\n" in head
        assert json.loads(body)["error"]["code"] == "invalid_http"
    assert httpx2.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        b"Authorization: Bearer the-secret\0x",
        b"Authorization : Bearer the-secret",
        b"Authorization: Bearer\r\n the-secret",
        b"Authorization: Bearer the-secret" + b"x" * 9000,
    ],
)
def test_malformed_http_is_logged_without_what_it_holds(
    serve: Serve, say: Say, caplog: pytest.LogCaptureFixture, header: bytes
) -> None:
    caplog.set_level("DEBUG")
    with connect(serve(say("ok"))) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
        assert b" 400 " in connection.recv(4096).split(b"\r\n")[0]
    [record] = (record for record in caplog.records if record.name == "aiohttp.server")
    assert record.levelname == "INFO" and record.exc_info is None
    assert "the-secret" not in caplog.text
    assert "the-secret" not in LineFormatter().format(record)


def test_why_the_engine_died_is_in_the_log_alone(serve: Serve) -> None:
    server = serve()
    server.core.send(EngineFailed(message="ValueError: of another tenant"))
    health = until_healthy(server, False)
    refusal = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "x"})
    assert (health.json()["error"]["code"], refusal.json()["error"]["code"]) == ("unhealthy", "engine_dead")
    assert "tenant" not in health.text + refusal.text


async def test_death_of_the_engine_in_mid_stream(serve: Serve) -> None:
    server = serve()
    async with server.async_client() as client:
        stream = await asyncio.gather(
            client.completions.create(model="tiny", prompt="x", stream=True), asyncio.to_thread(begin, server.core)
        )
        whole = asyncio.create_task(client.completions.create(model="tiny", prompt="y"))
        await asyncio.to_thread(server.core.expect, AddRequest)
        server.core.die()
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream[0]:
                pass
        assert caught.value.code == "engine_dead"
        with pytest.raises(openai.InternalServerError) as refused:
            await whole
        assert refused.value.status_code == 503
        assert refused.value.code == "engine_dead"
    assert until_healthy(server, False).json()["error"]["code"] == "unhealthy"
    assert httpx2.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 503


def begin(core: ScriptedCore) -> None:
    request = core.expect(AddRequest)
    core.output(
        RequestOutput(request_id=request.request_id), RequestOutput(request_id=request.request_id, token_ids=(5,))
    )


def test_health_follows_progress(serve: Serve) -> None:
    server = serve(stall_timeout=0.05)
    assert httpx2.get(f"{server.url}/health").status_code == 200
    with connect(server) as connection:
        connection.sendall(post("/v1/completions", json.dumps({"prompt": "x"}).encode()))
        request = server.core.expect(AddRequest)
        assert "no progress" in until_healthy(server, False).json()["error"]["message"]
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        server.core.output(RequestOutput(request_id=request.request_id, finish_reason=FinishReason.STOP))
        until_healthy(server, True)


def test_long_prompts_do_not_block_the_event_loop(serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one tenant's prompt is being tokenized, probes and other requests are answered."""
    server = serve(say("ok"))
    tokenizer = server.engine.tokenizer
    encode, entered, release = tokenizer.encode, threading.Event(), threading.Event()

    def slow_encode(text: str, *args: Any, **options: Any) -> list[int]:
        if len(text) > 10_000:
            entered.set()
            assert release.wait(WAIT_SECONDS)
        return encode(text, *args, **options)

    monkeypatch.setattr(tokenizer, "encode", slow_encode)
    with connect(server) as connection:
        connection.sendall(post("/v1/completions", json.dumps({"prompt": "x" * 20_000}).encode()))
        assert entered.wait(WAIT_SECONDS)
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert server.client().completions.create(model="tiny", prompt="x").choices[0].text == "ok"
        release.set()
        assert b" 400 " in connection.recv(4096).split(b"\r\n")[0]


def test_the_spelling_of_many_tokens_does_not_block_the_event_loop(
    serve: Serve, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(say("ok"))
    tokenizer, threads = server.engine.tokenizer, set[str]()
    token = tokenizer.token

    def spy(token_id: int) -> str:
        threads.add(threading.current_thread().name)
        return token(token_id)

    monkeypatch.setattr(tokenizer, "token", spy)
    body = {"prompt": "x " * 5000, "return_token_strs": True}
    answer = httpx2.post(f"{server.url}/tokenize", json=body).json()
    assert len(answer["token_strs"]) == answer["count"]
    assert threads and "server" not in threads
