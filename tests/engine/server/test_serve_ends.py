"""How `evenhand serve` ends, or does not begin: drains, deaths, signals, bad options."""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
from click.testing import CliRunner

from evenhand_engine.commands.options import quantity
from evenhand_engine.commands.serve import serve

from .processes import START_SECONDS, STOP_SECONDS, Start, running, tiny_servers

LONG_NAME = "m" * 20_000
"""In every event: a stream that is not read ends when it is, for its events do not fit between server and client."""


@pytest.fixture
def tiny(model_dir: Path) -> Iterator[Start]:
    with tiny_servers(model_dir) as start:
        yield start


@pytest.mark.parametrize("count", ["1", "2"])
def test_drain_lets_running_streams_finish(tiny: Start, count: str) -> None:
    server = tiny("--drain-timeout", "300", "--api-server-count", count, "--served-model-name", LONG_NAME)
    core = server.core
    with server.client() as client:
        model = client.models.list().data[0].id
        options: dict[str, Any] = {"model": model, "prompt": "x", "max_tokens": 1500, "stream": True}
        stream = client.completions.create(**options, extra_body={"ignore_eos": True, "skip_special_tokens": False})
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while (ready := httpx2.get(f"{server.url}/ready")).status_code == 200:
            assert time.monotonic() < deadline
        assert ready.json()["error"]["code"] == "draining"
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=model, prompt="x")
        assert caught.value.code == "draining"
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
    assert server.wait() == 0
    core.wait(STOP_SECONDS)
    draining = next(number for number, line in enumerate(server.log) if " draining " in line)
    rest = [line for line in server.log[draining + 1 :] if " evenhand.access " not in line]
    assert rest == [], "a clean end says nothing more, neither of its own nor of a library's"


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_clean_end_says_nothing_after_the_line_of_its_drain(tiny: Start, count: str) -> None:
    """Neither of its own nor of a library's, in any of its processes, whose compiled objects live to the end."""
    server = tiny("--api-server-count", count)
    with server.client() as client:
        options: dict[str, Any] = {"model": client.models.list().data[0].id, "prompt": "x", "max_tokens": 3}
        client.completions.create(**options)
        client.completions.create(**options, extra_body={"structured_outputs": {"regex": "[ab]*"}, "logprobs": 1})
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    log = server.whole_log()
    *_, draining = (number for number, line in enumerate(log) if " draining " in line)
    assert [line for line in log[draining + 1 :] if " evenhand.access " not in line] == []


def code_of_broken_stream(client: openai.OpenAI, breaks: Callable[[], None]) -> str | None:
    """Of the error that ends a stream, after its first token, when that is called."""
    options: dict[str, Any] = {"model": client.models.list().data[0].id, "prompt": "x", "max_tokens": 4000}
    stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    breaks()
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    return caught.value.code


@pytest.mark.parametrize("count", ["1", "2"])
def test_drain_timeout_ends_streams_with_a_reason(tiny: Start, count: str) -> None:
    server = tiny("--drain-timeout", "0", "--api-server-count", count)
    with server.client() as client:
        assert code_of_broken_stream(client, lambda: server.process.send_signal(signal.SIGTERM)) == "draining"
    assert server.wait() == 0


@pytest.mark.parametrize("count", ["1", "2"])
def test_death_of_the_core_ends_the_process(tiny: Start, count: str) -> None:
    server = tiny("--api-server-count", count)
    with server.client() as client:
        assert code_of_broken_stream(client, server.core.kill) == "engine_dead"
    assert server.wait() == 1


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_killed_server_takes_its_other_processes_along(tiny: Start, count: str) -> None:
    server = tiny("--api-server-count", count)
    others = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.wait()
    psutil.wait_procs(others, timeout=STOP_SECONDS)
    assert not any(process.is_running() for process in others)


@pytest.mark.parametrize("count", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_start_up(model_dir: Path, number: signal.Signals, count: str) -> None:
    ports = ("--port", "0", "--admin-port", "0", "--api-server-count", count)
    with running(str(model_dir), "--load-format", "dummy", *ports) as process:
        parent = psutil.Process(process.pid)
        deadline = time.monotonic() + START_SECONDS
        while not (children := parent.children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(STOP_SECONDS) == 0
        assert process.stderr is not None and without_progress(process.stderr.read()) == ""
        psutil.wait_procs(children, timeout=STOP_SECONDS)
        assert not any(child.is_running() for child in children)


def failure(*args: str) -> str:
    """What `evenhand serve` says when it cannot start."""
    with running(*args) as process:
        _, message = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 1, message
    assert "Traceback" not in message
    message = without_progress(message)
    assert message.startswith("evenhand: ")
    return message


def without_progress(log: str) -> str:
    """What else than how far the start has come."""
    return "".join(line for line in log.splitlines(True) if " INFO evenhand_engine.model.progress " not in line)


def test_start_up_errors(model_dir: Path, tmp_path: Path) -> None:
    ports = ("--port", "0", "--admin-port", "0")
    assert "no such directory" in failure("/nowhere/model", *ports)
    assert "model.safetensors" in failure(str(model_dir), *ports), "without weights"
    assert "too little memory" in failure(
        str(model_dir), *ports, "--load-format", "dummy", "--kv-cache-memory-bytes", "9000G"
    )
    (tmp_path / "bad.yaml").write_text("kind: Nonsense")
    assert "bad.yaml" in failure(str(model_dir), *ports, "--policies", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in failure("--host", "127.0.0.1", "--port", port, "--admin-port", "0")


@pytest.mark.parametrize("arguments", [[], ["--api-key", ""]])
def test_an_empty_key_does_not_open_the_server(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """As a Secret's empty value would, in a Pod's environment."""
    monkeypatch.setenv("EVENHAND_API_KEY", "" if not arguments else "a-key")
    outcome = CliRunner().invoke(serve, ["/nowhere/model", "--port", "0", "--admin-port", "0", *arguments])
    assert outcome.exit_code == 2
    assert "EVENHAND_API_KEY is empty" in outcome.output


@pytest.mark.parametrize(
    ("value", "number"), [("7", 7), ("2k", 2000), ("2K", 2048), ("1m", 10**6), ("1M", 2**20), ("1.5k", 1500)]
)
def test_quantities(value: str, number: int) -> None:
    assert quantity(value) == number


@pytest.mark.parametrize("args", [["--max-num-seqs", "0"], ["--max-model-len", "2x"], ["--port", "70000"], ["--what"]])
def test_bad_flags(args: list[str]) -> None:
    with running(*args) as process:
        _, message = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 2
        assert args[0] in message
