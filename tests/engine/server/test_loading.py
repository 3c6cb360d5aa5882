"""While the model is being loaded: who connects waits for a while, and is told then how far it has come."""

import concurrent.futures
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme

from evenhand_engine.messages import StartupFailed, StartupProgress
from evenhand_engine.server import loading

from .conftest import Say, Serve
from .processes import free_port
from .scripted_core import WAIT_SECONDS, Reply, ScriptedCore


class SlowCore(ScriptedCore):
    """Loads until `send(ready())`."""

    def __init__(self, reply: Reply | None = None) -> None:
        super().__init__(reply)
        self.loads = threading.Event()

    def start(self) -> None:
        self.send(StartupProgress(stage="loading the weights: 41 %"))
        self.loads.set()


@pytest.fixture
def executor() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield pool


def told(url: str, **options: Any) -> tuple[int, dict[str, Any], str]:
    """Status, error and Retry-After, once something listens and knows the stage."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            answer = httpx2.request("POST" if "completions" in url else "GET", url, **options)
            error = answer.json()["error"]
            if "41 %" in error["message"]:
                return answer.status_code, error, answer.headers["Retry-After"]
        except httpx2.TransportError:
            pass
        assert time.monotonic() < deadline


@pytest.mark.parametrize("count", [1, 2])
def test_every_port_tells_how_far_it_has_come(
    serve: Serve,
    say: Say,
    executor: concurrent.futures.ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 0.0)
    core = SlowCore(say("ok"))
    port, admin_port = free_port(), free_port()
    starting = executor.submit(serve, core=core, port=port, admin_port=admin_port, api_server_count=count)
    for url in (
        f"http://127.0.0.1:{port}/ready",
        f"http://127.0.0.1:{port}/health",
        f"http://127.0.0.1:{port}/v1/completions",
        f"http://127.0.0.1:{admin_port}/ready",
    ):
        status, error, retry_after = told(url)
        assert (status, error["code"], retry_after) == (503, "loading", "5")
        assert error["message"] == "The server is starting: loading the weights: 41 %."
    core.send(core.ready())
    server = starting.result(WAIT_SECONDS)
    assert server.client().completions.create(model="tiny", prompt="x").choices[0].text == "ok"
    assert httpx2.get(f"{server.admin_url}/ready").status_code == 200


def test_it_speaks_tls_where_the_server_will(
    serve: Serve,
    executor: concurrent.futures.ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 0.0)
    combined = tmp_path / "tls.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(combined)
    core, port = SlowCore(), free_port()
    starting = executor.submit(serve, core=core, port=port, ssl_certfile=combined)
    assert told(f"https://127.0.0.1:{port}/ready", verify=False)[0] == 503
    core.send(StartupFailed(message="no room for the weights"))
    with pytest.raises(Exception, match="no room for the weights"):
        starting.result(WAIT_SECONDS)


def test_who_connects_to_a_quick_start_waits(
    serve: Serve, say: Say, executor: concurrent.futures.ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 2 * WAIT_SECONDS)  # however slow this machine is
    core, port = SlowCore(say("ok")), free_port()
    starting = executor.submit(serve, core=core, port=port)
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS)
            break
        except ConnectionRefusedError:
            assert not starting.done()
    with connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        core.loads.wait(WAIT_SECONDS)
        core.send(core.ready())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
