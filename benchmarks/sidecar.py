"""The sidecar: what it adds to a stream, what it costs, and the incident before an engine that is first come, first served.

`--part streams`. Alone: one request after another, by turns and in random order straight to a scripted upstream and through the
sidecar; paired differences of the time to first token. Many: N streams at 20 events of 180 bytes a second each; gaps between
events at the client beside those without a sidecar, the sidecar's processor time by event, and its memory by stream.

`--part incident`. The incident of `make bench-incident`, with our engine under `fcfs`, without and with a sidecar before it; with
`--peer llama.cpp`, llama.cpp's server in its place. Upstream, sidecar and client share this machine.
"""

import asyncio
import contextlib
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import aiohttp
import common
import event_streams
import incident
import peers
import serving


async def paired_ttft(direct: str, through: str, rounds: int, rng: random.Random) -> list[float]:
    """Seconds that the sidecar adds to the first event of a lone request; the first tenth is warm-up."""
    added = []
    for _ in range(rounds):
        times = {}
        for url in rng.sample([direct, through], 2):
            times[url] = (await event_streams.one(url)).times[0]
        added.append(times[through] - times[direct])
    return added[rounds // 10 :]


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def scripted_upstream() -> Iterator[str]:
    port = serving.free_port()
    process = multiprocessing.get_context("spawn").Process(target=event_streams.run_upstream, args=(port,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.join()


def measure_streams(rounds: int, num_streams: int, seconds: float, seed: int) -> dict[str, float]:
    with scripted_upstream() as direct, serving.sidecar(direct) as server:
        added = asyncio.run(paired_ttft(direct, server.url, rounds, random.Random(seed)))
        idle, memory = resident_kib(server.pid), 0

        def look() -> None:
            nonlocal memory
            memory = resident_kib(server.pid)

        alone = asyncio.run(event_streams.many(direct, num_streams, seconds))
        used = processor_seconds(server.pid)
        through = asyncio.run(event_streams.many(server.url, num_streams, seconds, look))
        used = processor_seconds(server.pid) - used
    num_events = num_streams * int(seconds * event_streams.EVENTS_PER_SECOND)
    return {
        "ttft_added_p50_ms": 1e3 * median(added),
        "ttft_added_p99_ms": 1e3 * serving.percentile(added, 99),
        "gap_direct_p99_ms": 1e3 * serving.percentile(alone, 99),
        "gap_added_p99_ms": 1e3 * (serving.percentile(through, 99) - serving.percentile(alone, 99)),
        "events_per_s_per_core": num_events / used,
        "rss_per_stream_kib": (memory - idle) / num_streams,
        "num_streams": num_streams,
    }


class SidecarIncident(incident.Incident):
    """The incident, also through a sidecar before an engine that knows no tenants."""

    def run_through(self, seconds: float, settle: float | None) -> incident.Outcome:
        with (
            serving.serve("--scheduling-policy", "fcfs") as engine,
            serving.sidecar(engine.url, "--policies", str(self._policies)) as server,
        ):
            return asyncio.run(self._load(server, seconds, settle, chat=True, flood=True))


class PeerIncident(incident.Incident):
    """The incident with llama.cpp's server as the engine, whose counters say what it computed."""

    def run_on_peer(self, seconds: float, settle: float, *, has_sidecar: bool) -> incident.Outcome:
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(peers.llama_cpp())
            self._engine_url = engine.url
            server = engine
            if has_sidecar:
                server = stack.enter_context(serving.sidecar(engine.url, "--policies", str(self._policies)))
            return asyncio.run(self._load(server, seconds, settle, chat=True, flood=True))

    async def _tokens(self, server: serving.Server, tenant_id: str) -> int:
        if tenant_id != "batch":
            return 0  # one count of both
        async with aiohttp.ClientSession() as session, session.get(f"{self._engine_url}/metrics") as response:
            return peers.num_tokens(await response.text())


def measure_incident(peer: str | None, seconds: float, settle: float | None, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        if peer is None:
            load = SidecarIncident(seed, Path(directory))
            fcfs = load.run("fcfs", seconds=seconds, settle=settle)
            through = load.run_through(seconds, settle)
        else:
            on_peer = PeerIncident(seed, Path(directory))
            fcfs = on_peer.run_on_peer(seconds, settle or seconds, has_sidecar=False)
            through = on_peer.run_on_peer(seconds, settle or seconds, has_sidecar=True)
    before, after = (outcome.results()["chat_ttft_p95_s"] for outcome in (fcfs, through))
    assert before is not None and after is not None
    return {
        "chat_p95_fcfs_s": before,
        "chat_p95_s": after,
        "chat_p95_improvement": before / after,
        "tokens_per_s": through.tokens_per_s,
        "tokens_ratio": through.tokens_per_s / fcfs.tokens_per_s,
    }


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--part", choices=["streams", "incident", "all"], default="all")
    parser.add_argument("--peer", choices=["llama.cpp"], help="the engine of the incident; default: ours")
    options = parser.parse_args()
    quick, results = options.quick, dict[str, float]()
    if options.part != "incident":
        rounds, streams, seconds = (20, 50, 3.0) if quick else (300, options.streams, 15.0)
        results |= measure_streams(rounds, streams, seconds, options.seed)
    if options.part != "streams":
        seconds, settle = (6.0, 3.0) if quick else (45.0, None)
        results |= measure_incident(options.peer, seconds, settle, options.seed)
    rows = [[name, f"{value:.2f}"] for name, value in results.items()]
    common.print_table("evenhand sidecar", ["figure", "value"], rows)
    common.finish("sidecar", results)


if __name__ == "__main__":
    main()
