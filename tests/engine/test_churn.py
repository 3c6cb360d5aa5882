"""Churn against the real server: short requests, aborts, preemptions and reloads leave nothing behind.

A tiny model with random weights in a small KV cache, so that minutes hold what takes a day in production.
"""

import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from evenhand_engine.model.source import resolve_model_dir

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
POLICY = """\
apiVersion: evenhand.dev/v1alpha1
kind: TenantPolicy
metadata: {{name: {name}}}
spec:
  weight: {weight}
  latencyClass: {latency_class}
  suspend: {suspend}
  kvCache: {{guaranteedPercent: {guaranteed}, maxPercent: {most}}}
  identities: [{{name: keys, type: APIKey, apiKey: {{secretRef: {{name: {name}-keys}}}}}}]
---
apiVersion: v1
kind: Secret
metadata: {{name: {name}-keys}}
stringData: {{key: key-of-the-churn-tenant-{name}}}
"""
TENANTS = ("red", "green", "blue")


@dataclass
class Server:
    """A running `evenhand serve`."""

    process: psutil.Process
    url: str
    admin_url: str
    policies: Path

    def open_files(self) -> int:
        """Descriptors of the HTTP process and of the engine core."""
        return sum(process.num_fds() for process in (self.process, *self.process.children(recursive=True)))

    def num_threads(self) -> int:
        return sum(process.num_threads() for process in (self.process, *self.process.children(recursive=True)))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_policies(directory: Path, rng: random.Random) -> None:
    """New weights, classes, KV shares and suspensions, by atomic replacement."""
    documents = [
        POLICY.format(
            name=name,
            weight=rng.randint(1, 9),
            latency_class=rng.choice(("Interactive", "Standard", "Batch")),
            suspend="true" if rng.random() < 0.1 else "false",
            guaranteed=rng.choice((0, 10, 30)),
            most=rng.choice((60, 100)),
        )
        for name in TENANTS
        if rng.random() < 0.9
    ]
    temporary = directory / ".policies.yaml"
    temporary.write_text("---\n".join(documents))
    temporary.rename(directory / "policies.yaml")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    model, policies = tmp_path / "model", tmp_path / "policies"
    ignored = shutil.ignore_patterns("*.safetensors*", "config.json")
    shutil.copytree(resolve_model_dir(None), model, ignore=ignored)
    (model / "config.json").write_text(json.dumps(TINY))
    policies.mkdir()
    write_policies(policies, random.Random(0))
    port, admin_port = free_port(), free_port()
    flags = f"--host 127.0.0.1 --port {port} --admin-port {admin_port} --load-format dummy --log-level error"
    limits = "--kv-cache-memory-bytes 1M --max-num-seqs 16 --max-num-batched-tokens 64"
    command = [Path(sys.executable).parent / "evenhand", "serve", model, *flags.split(), *limits.split()]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--policies", policies],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # the model is too small to share out
        )
        try:
            deadline = time.monotonic() + 280
            while not is_ready(port):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
            yield Server(
                psutil.Process(process.pid), f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}", policies
            )
            process.terminate()
            assert process.wait(timeout=280) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()


def is_ready(port: int) -> bool:
    """It listens before: a start that takes long answers 503."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


async def one_request(session: aiohttp.ClientSession, server: Server, rng: random.Random) -> str:
    """One short completion, streamed or not, perhaps given up; returns how it ended."""
    tenant = rng.choice((*TENANTS, None))
    headers = {"Authorization": f"Bearer key-of-the-churn-tenant-{tenant}"} if tenant else {}
    stream = rng.random() < 0.6
    shared = rng.random() < 0.3
    body: dict[str, Any] = {
        "prompt": list(range(100, 180)) if shared else [rng.randrange(1000, 40000) for _ in range(rng.randint(1, 90))],
        "max_tokens": rng.randint(1, 40),
        "stream": stream,
        "temperature": rng.choice((0, 1)),
        "ignore_eos": True,
    }
    patience = rng.uniform(0.0, 0.3) if rng.random() < 0.25 else 280.0
    try:
        async with (
            asyncio.timeout(patience),
            session.post(f"{server.url}/v1/completions", json=body, headers=headers) as response,
        ):
            data = await response.read()
            if response.status != 200:
                return str(response.status)
            assert data.endswith(b"data: [DONE]\n\n") if stream else json.loads(data)["choices"]
            return "finished"
    except TimeoutError:
        assert patience < 280.0, "a request got no answer"
        return "abandoned"


async def churn(server: Server, num_requests: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    ends: dict[str, int] = {}
    slots = asyncio.Semaphore(40)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def run() -> None:
            async with slots:
                end = await one_request(session, server, rng)
            ends[end] = ends.get(end, 0) + 1

        async with asyncio.TaskGroup() as group:
            for number in range(num_requests):
                await slots.acquire()
                slots.release()
                group.create_task(run())
                if number % 100 == 99:
                    write_policies(server.policies, rng)
    return ends


async def metrics(server: Server) -> dict[str, float]:
    """The engine's metrics, summed over their labels."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.admin_url}/metrics") as response:
        text = await response.text()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


async def until_idle(server: Server) -> dict[str, float]:
    """Metrics once the last abort has reached the engine; bounded, so that a leak fails the test."""
    for _ in range(100):
        totals = await metrics(server)
        if totals["vllm:num_requests_running"] == totals["vllm:num_requests_waiting"] == 0:
            return totals
        await asyncio.sleep(0.1)
    raise AssertionError(f"requests are left: {totals}")


async def check_churn(server: Server, num_requests: int) -> None:
    await churn(server, 100, seed=1)  # pools, caches and lazily opened files reach their size
    await until_idle(server)
    files, threads = server.open_files(), server.num_threads()
    ends = await churn(server, num_requests, seed=2)
    totals = await until_idle(server)
    assert sum(ends.values()) == num_requests
    assert ends["finished"] > num_requests / 3 and ends["abandoned"] > 0
    assert set(ends) <= {"finished", "abandoned", "401", "403"}, ends
    assert totals["vllm:num_preemptions_total"] > 0, "the cache was to be too small"
    assert totals["vllm:kv_cache_usage_perc"] == 0
    async with aiohttp.ClientSession() as session, session.get(f"{server.admin_url}/v1/tenants") as response:
        for tenant in (await response.json())["tenants"]:
            assert (tenant["inFlight"], tenant["running"], tenant["waiting"], tenant["kvBlocks"]) == (0, 0, 0, 0)
    assert server.open_files() <= files + 2
    assert server.num_threads() <= threads + 2


async def test_churn_leaves_nothing_behind(server: Server) -> None:
    await check_churn(server, 400)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_long_churn_leaves_nothing_behind(server: Server) -> None:
    await check_churn(server, 20_000)
