"""The sidecar before a real llama.cpp server, where one is installed: EVENHAND_LLAMA_SERVER and EVENHAND_LLAMA_MODEL name them."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from evenhand_engine.sidecar.body import Body

from .conftest import DONE, Sidecar, Start

BINARY = os.environ.get("EVENHAND_LLAMA_SERVER") or shutil.which("llama-server")
MODEL = os.environ.get("EVENHAND_LLAMA_MODEL")
NUM_SLOTS, CONTEXT = 2, 2048
STARTUP_SECONDS = 90.0

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not (BINARY and MODEL), reason="no llama.cpp: EVENHAND_LLAMA_SERVER, EVENHAND_LLAMA_MODEL"),
]


class Peer:
    """A running server."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [str(BINARY), "-m", str(MODEL), "--host", "127.0.0.1", "--port", str(port), "--metrics", "-t", "2"]
        command += ["--parallel", str(NUM_SLOTS), "-c", str(CONTEXT), "--no-kv-unified"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self._is_well():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)

    def _is_well(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
        except (OSError, urllib.error.URLError):
            return False
        return True

    def gauge(self, name: str) -> int:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as response:
            found = re.search(rf"^llamacpp:{name} (\d+)", response.read().decode(), re.MULTILINE)
        assert found is not None
        return int(found[1])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    running = Peer(tmp_path_factory.mktemp("llama") / "log.txt")
    yield running
    running.stop()


async def before(peer: Peer, start: Start) -> Sidecar:
    sidecar = await start(peer.url, connect_timeout=5.0, idle_timeout=120.0)
    await sidecar.until(lambda: sidecar.upstream.dispatcher.window.num_seats == NUM_SLOTS)
    assert sidecar.upstream.connection.backend == "llama.cpp"
    return sidecar


def said(text: bytes) -> list[dict[str, Any]]:
    """The stream's events, but for its end."""
    return [json.loads(each[6:]) for each in text.split(b"\n\n") if each.startswith(b"data: {")]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_what_it_counts_is_what_is_charged(peer: Peer, start: Start, path: str) -> None:
    sidecar = await before(peer, start)
    prompt = {"messages": [{"role": "user", "content": "Say hi."}]} if "chat" in path else {"prompt": "Say hi."}
    body = {**prompt, "max_tokens": 5, "cache_prompt": False}
    counted = await sidecar.prompts.count("default", Body(json.dumps(body).encode()), is_limited=True)
    async with sidecar.post(body, path) as response:
        usage = (await response.json())["usage"]
    assert usage["prompt_tokens"] == counted
    await sidecar.settled()
    assert sidecar.tokens() == (usage["prompt_tokens"], usage["completion_tokens"])
    async with sidecar.post({**body, "stream": True}, path) as response:
        text = await response.read()
    await sidecar.settled()
    assert text.endswith(DONE) and all(event["choices"] for event in said(text)), "its usage was to be hidden"
    assert sidecar.tokens()[0] == 2 * counted and sidecar.tokens()[1] <= 10


async def test_its_own_completions_are_counted_too(peer: Peer, start: Start) -> None:
    sidecar = await before(peer, start)
    async with sidecar.post(
        {"prompt": "One two", "n_predict": 4, "stream": True, "cache_prompt": False}, "/completion"
    ) as response:
        last = said(await response.read())[-1]
    await sidecar.settled()
    assert sidecar.tokens() == (last["tokens_evaluated"], last["tokens_predicted"])


async def test_what_does_not_fit_into_its_slots_waits_here(peer: Peer, start: Start) -> None:
    sidecar = await before(peer, start)
    request_table = sidecar.upstream.dispatcher.request_table
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 60, "ignore_eos": True}
    streams = [asyncio.create_task(sidecar.stream(**body)) for _ in range(5)]
    await sidecar.until(lambda: request_table.num_running == NUM_SLOTS and request_table.num_waiting == 5 - NUM_SLOTS)
    assert await asyncio.to_thread(peer.gauge, "requests_deferred") == 0
    assert {status for status, _ in await asyncio.gather(*streams)} == {200}
    await sidecar.settled()


async def test_a_client_that_leaves_frees_its_slot(peer: Peer, start: Start) -> None:
    sidecar = await before(peer, start)
    async with sidecar.post(
        {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}, "/v1/completions"
    ) as r:
        await r.content.readuntil(b"\n\n")
        assert await asyncio.to_thread(peer.gauge, "requests_processing") == 1
        r.close()
    await sidecar.settled()
    async with asyncio.timeout(30):
        while await asyncio.to_thread(peer.gauge, "requests_processing"):
            await asyncio.sleep(0.05)
    assert 1 <= sidecar.tokens()[1] < 900


async def test_what_it_refuses_costs_nothing(peer: Peer, start: Start) -> None:
    sidecar = await before(peer, start)
    async with sidecar.post({"prompt": list(range(1000, 3000)), "max_tokens": 2}, "/v1/completions") as response:
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "exceed_context_size_error"
    await sidecar.settled()
    assert sidecar.tokens() == (0, 0)


async def test_its_death_ends_a_stream_with_a_reason(tmp_path: Path, start: Start) -> None:
    mortal = await asyncio.to_thread(Peer, tmp_path / "log.txt")
    try:
        sidecar = await before(mortal, start)
        async with sidecar.post(
            {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}, "/v1/completions"
        ) as response:
            await response.content.readuntil(b"\n\n")
            mortal.process.kill()
            text = await response.read()
        assert said(text)[-1]["error"]["code"] == "upstream_error" and DONE not in text
        await sidecar.until(lambda: sidecar.upstream.problem is not None)
        async with sidecar.post({"prompt": "a"}, "/v1/completions") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "upstream_unavailable")
        await sidecar.settled()
    except aiohttp.ClientError as error:
        raise AssertionError("the client saw no end of its stream") from error
    finally:
        mortal.stop()
