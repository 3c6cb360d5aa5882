"""A real `evenhand serve` or `evenhand sidecar` process for benchmarks, and the tenants that load it."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai

STARTUP_SECONDS = 180.0
MODEL = "benchmark"


@dataclass
class Server:
    """A running server. `admin_url` is its admin port's, `pid` that of its HTTP process. `max_retries`: of a request that fails."""

    url: str
    admin_url: str
    pid: int
    max_retries: int = 0

    def client(self, api_key: str) -> openai.AsyncOpenAI:
        """The official client, as the tenant that `api_key` proves."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=self.max_retries, timeout=3600
        )

    async def tenants(self) -> list[dict[str, Any]]:
        """The tenants' live state by the admin port."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.admin_url}/v1/tenants") as response:
            found: list[dict[str, Any]] = (await response.json())["tenants"]
        return found

    async def tenant(self, tenant_id: str) -> dict[str, Any]:
        """One of them; empty: there is none."""
        return next((tenant for tenant in await self.tenants() if tenant["tenantId"] == tenant_id), {})


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serve(*flags: str) -> contextlib.AbstractContextManager[Server]:
    """Start `evenhand serve` with the flags on free loopback ports; stopped at the end, whatever happens."""
    return _run([_evenhand(), "serve"], "--served-model-name", MODEL, *flags)


def paced(device: str, kv_tokens: int, *flags: str) -> contextlib.AbstractContextManager[Server]:
    """The same at the pace of a device of the simulator: see paced_engine.py."""
    script = str(Path(__file__).parent / "paced_engine.py")
    return _run([sys.executable, script, device, str(kv_tokens)], "--served-model-name", MODEL, *flags)


def sidecar(upstream: str, *flags: str) -> contextlib.AbstractContextManager[Server]:
    """Start `evenhand sidecar` before the upstream in the same way."""
    return _run([_evenhand(), "sidecar"], "--upstream", upstream, *flags)


def _evenhand() -> str:
    return str(Path(sys.executable).parent / "evenhand")


@contextlib.contextmanager
def _run(program: Sequence[str], *flags: str) -> Iterator[Server]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped even then
    port, admin_port = free_port(), free_port()
    command = [*program, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--admin-port", str(admin_port), "--log-level", "warning", "--drain-timeout", "1", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            await_port(process, port, log, "/ready")
            yield Server(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def await_port(process: subprocess.Popen[bytes], port: int, log: Any, path: str) -> None:
    """Until the server answers there. Raises SystemExit with its log if it ends before."""
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"the server ended with {process.returncode}:\n{log.read().decode()}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).close()
            return
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


@dataclass
class Timing:
    """When one streamed request was sent, and when text of it came (monotonic seconds).

    A token that ends inside a character is held back until the character is whole, so `token_counts` says how many
    tokens had been computed by each time.
    """

    sent_at: float
    token_times: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    is_finished: bool = False

    def time_to_first_token(self, now: float) -> float:
        """Seconds; of a request without a token yet, how long it has waited until `now`."""
        return (self.token_times[0] if self.token_times else now) - self.sent_at

    def gaps(self, now: float) -> list[float]:
        """Seconds between tokens; for an unfinished request the gap that is still open counts too."""
        times = self.token_times if self.is_finished or not self.token_times else [*self.token_times, now]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


async def stream(client: openai.AsyncOpenAI, timing: Timing, prompt: list[int], max_tokens: int) -> None:
    """Send one completion with a token-id prompt, and note the times of its tokens."""
    chunks = await client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    async for chunk in chunks:
        if chunk.choices:
            timing.token_times.append(time.monotonic())
            last = timing.token_counts[-1] if timing.token_counts else 0
            timing.token_counts.append(
                chunk.usage.completion_tokens if chunk.usage else last + 1
            )  # a peer may say nothing
    timing.is_finished = True


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; NaN for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


async def cancel(tasks: list[asyncio.Task[None]]) -> None:
    """End tasks and wait until they are gone; an error that one ended with is raised."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
