"""How a sidecar of one or two processes ends while streams run: by a signal, or by the death of the one that was started."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import DONE, WAIT_SECONDS, ScriptedUpstream, event
from .pinned_clients import Gate, Pinned
from .sidecar_process import SidecarProcess, sidecar_process, write_policy
from .test_bad_upstreams import code_of

Answer = tuple[int, bytes]
Asked = list["asyncio.Task[Answer]"]


@pytest.fixture(autouse=True)
async def limit() -> AsyncIterator[None]:
    async with asyncio.timeout(WAIT_SECONDS):
        yield


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    (tmp_path / "policies").mkdir()
    write_policy(tmp_path / "policies", "a")
    return tmp_path / "policies"


@pytest.fixture
def gate(upstream: ScriptedUpstream) -> Gate:
    upstream.script = scripted = Gate()
    return scripted


@dataclass
class Load:
    """What a sidecar has to do: of each process a stream that has begun, one that waits for a seat, and an idle client."""

    streams: Asked
    waiting: Asked
    idle: list[Pinned]

    async def ends_as_drained(self) -> None:
        """Streams in their midst, what waits without a beginning, both with the reason."""
        for status, text in await asyncio.gather(*self.streams):
            assert (status, code_of(text)) == (200, "draining") and text.startswith(event()) and DONE not in text
        assert {(status, code_of(text)) for status, text in await asyncio.gather(*self.waiting)} == {(503, "draining")}


async def load(sidecar: SidecarProcess) -> Load:
    """Of one that is started with a seat for each process at its port."""
    parts, streams = await sidecar.connect(3), Asked()
    for client, _, _ in parts:
        begun = asyncio.Event()
        streams.append(asyncio.create_task(follow(client, begun)))
        await begun.wait()
    waiting = [asyncio.create_task(client.ask("a", "waits")) for _, client, _ in parts]
    await sidecar.until_queued(len(parts))
    return Load(streams, waiting, [client for *_, client in parts])


async def follow(client: Pinned, begun: asyncio.Event) -> Answer:
    async with client.post("a", "runs") as response:
        text = await response.content.readuntil(b"\n\n")
        begun.set()
        return response.status, text + await response.read()


async def refuse_what_is_new(clients: list[Pinned]) -> None:
    """Until they do, in every process."""
    for client in clients:
        while (await client.get("/ready"))[0] == 200:
            await asyncio.sleep(0.01)
        status, text = await client.ask("a", "new")
        assert (status, code_of(text)) == (503, "draining")


async def test_the_owners_death_ends_who_waits_and_lets_streams_go_on(
    upstream: ScriptedUpstream, policies: Path, gate: Gate
) -> None:
    """Its API servers end with their streams; the ports are free at once, for another."""
    flags = ("--api-server-count", "2", "--max-num-seqs", "2")
    async with sidecar_process(upstream.url, policies, *flags, "--drain-timeout", "1000") as sidecar:
        ports = [int(url.rpartition(":")[2]) for url in (sidecar.url, sidecar.admin_url)]
        work = await load(sidecar)
        sidecar.process.kill()
        assert await sidecar.process.wait() == -signal.SIGKILL
        assert {(status, code_of(text)) for status, text in await asyncio.gather(*work.waiting)} == {(503, "draining")}
        await refuse_what_is_new(work.idle)
        assert not any(stream.done() for stream in work.streams)

        async with sidecar_process(upstream.url, policies, *flags, ports=ports) as another:
            gate.open("next")
            for [client] in await another.connect(1):
                status, text = await client.ask("a", "next")
                assert status == 200 and text.endswith(DONE)

        gate.open("runs")
        for status, text in await asyncio.gather(*work.streams):
            assert status == 200 and text.startswith(event()) and text.endswith(DONE)
        await sidecar.all_have_ended()
    assert sorted(gate.came) == ["next", "next", "runs", "runs"]
    assert upstream.num_open == 0


async def test_the_owners_death_ends_streams_that_outlast_a_drain(
    upstream: ScriptedUpstream, policies: Path, gate: Gate
) -> None:
    flags = ("--api-server-count", "2", "--max-num-seqs", "2", "--drain-timeout", "0")
    async with sidecar_process(upstream.url, policies, *flags) as sidecar:
        work = await load(sidecar)
        sidecar.process.kill()
        await work.ends_as_drained()
        await sidecar.all_have_ended()
    while upstream.num_open:
        await asyncio.sleep(0.01)
    assert upstream.num_cancelled == 2 and gate.came == ["runs"] * 2


@pytest.mark.parametrize("count", [1, 2])
async def test_a_signal_lets_end_what_runs_and_what_waits(
    upstream: ScriptedUpstream, policies: Path, gate: Gate, count: int
) -> None:
    flags = ("--api-server-count", str(count), "--max-num-seqs", str(count), "--drain-timeout", "1000")
    async with sidecar_process(upstream.url, policies, *flags) as sidecar:
        work = await load(sidecar)
        for pid in {sidecar.process.pid} | sidecar.port_pids:  # as a terminal does
            os.kill(pid, signal.SIGTERM)
        await refuse_what_is_new(work.idle)
        assert not any(stream.done() for stream in work.streams)
        gate.open("runs")
        gate.open("waits")
        for status, text in await asyncio.gather(*work.streams, *work.waiting):
            assert status == 200 and text.startswith(event()) and text.endswith(DONE)
        assert await sidecar.process.wait() == 0
        await sidecar.all_have_ended()
    assert sorted(gate.came) == ["runs"] * count + ["waits"] * count


@pytest.mark.parametrize("count", [1, 2])
async def test_a_signal_ends_what_outlasts_the_drain_with_a_reason(
    upstream: ScriptedUpstream, policies: Path, gate: Gate, count: int
) -> None:
    """Which is not the engine's failure."""
    flags = ("--api-server-count", str(count), "--max-num-seqs", str(count), "--drain-timeout", "0")
    async with sidecar_process(upstream.url, policies, *flags) as sidecar:
        work = await load(sidecar)
        sidecar.process.send_signal(signal.SIGTERM)
        await work.ends_as_drained()
        assert await sidecar.process.wait() == 0
        await sidecar.all_have_ended()
    while upstream.num_open:
        await asyncio.sleep(0.01)
    assert upstream.num_cancelled == count and gate.came == ["runs"] * count
