"""`evenhand serve` as a process of its own, with the real engine core: the default model, and a tiny one for faults."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
import yaml
from click.testing import CliRunner

from evenhand_engine.commands.options import quantity
from evenhand_engine.commands.serve import serve
from evenhand_engine.errors import StartupError
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.text.tokenizer import Tokenizer

START_SECONDS = 120.0  # torch alone takes 5 s to import, and the machine may be busy
STOP_SECONDS = 60.0
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class ServeProcess:
    """A running `evenhand serve`."""

    process: "subprocess.Popen[str]"
    url: str
    admin_url: str
    log: list[str]

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options)

    @property
    def core(self) -> psutil.Process:
        """The engine core: the child that has torch in memory."""
        return max(psutil.Process(self.process.pid).children(recursive=True), key=lambda p: p.memory_info().rss)

    def wait(self) -> int:
        return self.process.wait(STOP_SECONDS)


Command = Callable[..., "subprocess.Popen[str]"]
Start = Callable[..., ServeProcess]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(*args: str) -> Iterator["subprocess.Popen[str]"]:
    command = [str(Path(sys.executable).with_name("evenhand")), "serve", *args]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        family = [psutil.Process(process.pid)]
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family += family[0].children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()


@contextlib.contextmanager
def serving(*args: str) -> Iterator[ServeProcess]:
    admin_port = free_port()
    with running("--host", "127.0.0.1", "--port", "0", "--admin-port", str(admin_port), *args) as process:
        log: list[str] = []
        found = threading.Event()

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                log.append(line)
                if "Evenhand serves" in line:
                    found.set()
            found.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert found.wait(START_SECONDS), log
        urls = [url for line in log if (url := re.search(r"at (http\S+)/v1", line))]
        assert urls, log
        yield ServeProcess(process, urls[0][1], f"http://127.0.0.1:{admin_port}", log)
    reader.join(STOP_SECONDS)


@pytest.fixture(scope="module")
def default_model() -> Iterator[ServeProcess]:
    try:
        resolve_model_dir(None)
    except StartupError as error:
        pytest.skip(f"the default model cannot be had: {error}")
    with serving() as server:
        yield server


@pytest.fixture
def tiny(model_dir: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(serving(str(model_dir), "--load-format", "dummy", *args))


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smollm2-135m-instruct", "messages": PARIS, "temperature": 0, "max_tokens": 20} | options
    )


def test_the_capital_of_france(default_model: ServeProcess) -> None:
    with default_model.client() as client:
        answer = ask(client)
        assert "Paris" in answer.choices[0].message.content
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True))
        assert streamed == answer.choices[0].message.content
        again = ask(client)
    assert again.usage.prompt_tokens_details.cached_tokens > 0, "the second prompt hits the prefix cache"
    assert again.choices[0].message.content == answer.choices[0].message.content


async def test_the_capital_of_france_async(default_model: ServeProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{default_model.url}/v1", api_key="none", timeout=120) as client:
        stream = await client.chat.completions.create(
            model="smollm2-135m-instruct", messages=PARIS, temperature=0, max_tokens=20, stream=True
        )
        assert "Paris" in "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_stop_string_and_usage(default_model: ServeProcess) -> None:
    with default_model.client() as client:
        answer = ask(client, stop=" of")
    assert answer.choices[0].message.content == "The capital"
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "stop"


def test_the_default_model_is_sampled_as_its_card_recommends() -> None:
    defaults = Tokenizer(resolve_model_dir(None)).sampling_defaults
    assert (defaults.temperature, defaults.top_p) == (0.2, 0.9)


def test_an_output_follows_its_schema_beside_free_ones(default_model: ServeProcess) -> None:
    """The default model alone would hardly write JSON; at this temperature it writes nonsense."""
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 10},
            "size": {"enum": ["small", "large"]},
            "people": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["city", "size", "people"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    with default_model.client() as client, ThreadPoolExecutor(4) as threads:
        asked = [
            threads.submit(ask, client, seed=seed, temperature=1.5, max_tokens=120, response_format=named)
            for seed in range(3)
        ]
        free = threads.submit(ask, client, max_tokens=60)
        found = [json.loads(future.result().choices[0].message.content) for future in asked]
        choice = ask(client, temperature=1.5, extra_body={"guided_choice": ["London", "Rome"]})
    for answer in found:
        assert list(answer) == ["city", "size", "people"]
        assert len(answer["city"]) <= 10 and answer["size"] in ("small", "large") and 1 <= answer["people"] <= 99
    assert "Paris" in free.result().choices[0].message.content
    assert choice.choices[0].message.content in ("London", "Rome")
    assert choice.choices[0].finish_reason == "stop"


def test_a_grammar_that_becomes_too_complex_is_said_so(default_model: ServeProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        default_model.client().completions.create(
            model="smollm2-135m-instruct",
            prompt="x",
            max_tokens=200,
            temperature=0,
            extra_body={"structured_outputs": {"regex": r"((\w|\s)*\w(\d|\w|.){30}){1,50}"}},
        )
    assert caught.value.code == "grammar_too_complex"


def test_scores_of_an_echo_are_those_of_the_prompt(default_model: ServeProcess) -> None:
    """As lm-eval asks for them; the likelier ending has the higher one."""
    with default_model.client() as client:
        scores = []
        for ending in (" Paris", " Tokyo"):
            answer = client.completions.create(
                model="smollm2-135m-instruct",
                prompt=f"The capital of France is{ending}",
                max_tokens=0,
                echo=True,
                logprobs=1,
            )
            told = answer.choices[0].logprobs
            assert told is not None and told.tokens is not None and told.token_logprobs is not None
            assert "".join(told.tokens) == f"The capital of France is{ending}" and told.token_logprobs[0] is None
            scores.append(told.token_logprobs[-1])
    assert scores[0] > scores[1]


def test_seed_makes_sampling_reproducible(default_model: ServeProcess) -> None:
    with default_model.client() as client:
        texts = [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def idle(server: ServeProcess) -> dict[str, Any]:
    """The default tenant's state, once nothing of it is in the engine."""
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        (state,) = httpx2.get(f"{server.admin_url}/v1/tenants").json()["tenants"]
        if not (state["running"] or state["waiting"] or state["inFlight"] or state["kvBlocks"]):
            return dict(state)
        assert time.monotonic() < deadline, state
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_client_gone_frees_its_blocks(default_model: ServeProcess, stream: bool) -> None:
    before = idle(default_model)["generationTokens"]
    body = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    with (
        contextlib.suppress(httpx2.ReadTimeout),
        httpx2.Client(timeout=1.0) as client,
        client.stream("POST", f"{default_model.url}/v1/completions", json=body) as answer,
    ):
        next(answer.iter_bytes())
    assert idle(default_model)["generationTokens"] - before < 1000


def test_metrics_come_from_the_real_engine(default_model: ServeProcess) -> None:
    text = httpx2.get(f"{default_model.admin_url}/metrics").text
    value = re.search(
        r'^vllm:generation_tokens_total\{engine="0",model_name="smollm2-135m-instruct"\} (.+)$', text, re.M
    )
    assert value is not None and float(value[1]) > 0
    assert re.search(r'^evenhand_service_total\{tenant="default"\} [1-9]', text, re.M)


def test_policies_reach_the_engine(tiny: Start, tmp_path: Path) -> None:
    def write(weight: int) -> str:
        metadata = {"name": "default", "namespace": "default"}
        policy = {"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy", "metadata": metadata}
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(policy | {"spec": {"tenant": "team", "weight": weight}}))
        return "ok"

    write(2)
    server = tiny("--policies", str(tmp_path))
    for weight in (2, 5):
        write(weight)
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            with server.client() as client:
                client.completions.create(model=client.models.list().data[0].id, prompt="x", max_tokens=1)
            state = httpx2.get(f"{server.admin_url}/v1/scheduler-config").json()
            if state["config"]["tenants"][0]["weight"] == weight and state["engineDigest"] == state["digest"]:
                break
            assert time.monotonic() < deadline, state
            time.sleep(0.1)


@pytest.mark.parametrize("count", ["1", "2"])
def test_drain_lets_running_streams_finish(tiny: Start, count: str) -> None:
    server = tiny("--drain-timeout", "300", "--api-server-count", count)
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
def test_drain_timeout_ends_streams_with_a_reason(tiny: Start, count: str) -> None:
    server = tiny("--drain-timeout", "0", "--api-server-count", count)
    with server.client() as client:
        options: dict[str, Any] = {"model": client.models.list().data[0].id, "prompt": "x", "max_tokens": 4000}
        stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert caught.value.code == "draining"
    assert server.wait() == 0


@pytest.mark.parametrize("count", ["1", "2"])
def test_death_of_the_core_ends_the_process(tiny: Start, count: str) -> None:
    server = tiny("--api-server-count", count)
    with server.client() as client:
        options: dict[str, Any] = {"model": client.models.list().data[0].id, "prompt": "x", "max_tokens": 4000}
        stream = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
        next(stream)
        server.core.kill()
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert caught.value.code == "engine_dead"
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
        assert process.stderr is not None and process.stderr.read() == ""
        psutil.wait_procs(children, timeout=STOP_SECONDS)
        assert not any(child.is_running() for child in children)


def failure(*args: str) -> str:
    """What `evenhand serve` says when it cannot start."""
    with running(*args) as process:
        _, message = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 1, message
    assert "Traceback" not in message
    assert message.startswith("evenhand: ")
    return message


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
