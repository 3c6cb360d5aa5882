"""The sidecar: what it adds to a stream, what it costs, and the incident before an engine that is first come, first served.

`--part streams`. Alone: one request after another, by turns and in random order straight to a scripted upstream and through the
sidecar; paired differences of the time to first token. Many: N streams at 20 events of 180 bytes a second each; gaps between
events at the client beside those without a sidecar, the sidecar's processor time by event, and its memory by stream.

`--part incident`. A chat beside a flood that keeps 16 long prompts in flight, before our engine under `fcfs`, without and with a
sidecar: 640 + 10 tokens beside 16 + 16, so that without a sidecar the chat waits for less than the run measures, and in steps of 160
tokens, a quarter of such a prompt as 2,048 are of 8,000. With `--peer llama.cpp`, llama.cpp's server in its place.

`--part gpu-incident`. The same with 8,000 + 16 tokens beside 200 + 100 a second, before our engine at the pace of an H100 (paced_engine.py).

Upstream, sidecar and client share this machine. Streams: where it has two cores, the sidecar has one of them to itself.
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
    with contextlib.ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:  # children inherit it: first the sidecar's, then everybody else's
            stack.callback(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, cores[:-1])
        direct = stack.enter_context(scripted_upstream())
        os.sched_setaffinity(0, cores[-1:])
        server = stack.enter_context(serving.sidecar(direct))
        os.sched_setaffinity(0, cores[:-1] or cores)
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


SCALED = incident.Traffic(chat_prompt=16, chat_output=16, batch_prompt=640, batch_output=10)
ON_GPU = incident.Traffic(chat_interval=1.0, chat_prompt=200, chat_output=100, batch_prompt=8000, batch_output=16)


class SidecarIncident(incident.Incident):
    """The incident before an engine that knows no tenants, without and with a sidecar; `paced`: see paced_engine.py."""

    def __init__(self, seed: int, directory: Path, *, paced: bool) -> None:
        super().__init__(seed, directory, ON_GPU if paced else SCALED)
        self._paced = paced

    def run_before(self, seconds: float, settle: float | None, *, has_sidecar: bool) -> incident.Outcome:
        policies = ["--policies", str(self._policies)]
        with contextlib.ExitStack() as stack:
            if self._paced:
                server = stack.enter_context(
                    serving.paced("h100-8b", 400_000, "--scheduling-policy", "fcfs", *policies)
                )
            else:
                budget = ["--max-num-batched-tokens", "160"]
                server = stack.enter_context(serving.serve("--scheduling-policy", "fcfs", *budget, *policies))
            if has_sidecar:
                server = stack.enter_context(serving.sidecar(server.url, *policies))
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


def measure_incident(part: str, peer: str | None, seconds: float, settle: float | None, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        if peer is None:
            load = SidecarIncident(seed, Path(directory), paced=part == "gpu-incident")
            fcfs = load.run_before(seconds, settle, has_sidecar=False)
            through = load.run_before(seconds, fcfs.settle_s, has_sidecar=True)
        else:
            on_peer = PeerIncident(seed, Path(directory), SCALED)
            fcfs, through = (on_peer.run_on_peer(seconds, settle or seconds, has_sidecar=has) for has in (False, True))
    results: dict[str, float] = {}
    for name, outcome in (("_fcfs", fcfs), ("", through)):
        waits = [wait for _, wait, _ in outcome.chat]
        results |= {f"chat_p{p}{name}_s": serving.percentile(waits, p) for p in (50, 95)}
        results[f"chat_unanswered{name}"] = sum(not has_token for *_, has_token in outcome.chat)
    return results | {
        "chat_p95_improvement": results["chat_p95_fcfs_s"] / results["chat_p95_s"],
        "tokens_per_s": through.tokens_per_s,
        "tokens_ratio": through.tokens_per_s / fcfs.tokens_per_s,
        "num_chats": len(through.chat),
    }


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--part", choices=["streams", "incident", "gpu-incident", "all"], default="all")
    parser.add_argument("--peer", choices=["llama.cpp"], help="the engine of the incident; default: ours")
    options = parser.parse_args()
    quick, results = options.quick, dict[str, float]()
    if options.part in ("streams", "all"):
        rounds, streams, seconds = (20, 50, 3.0) if quick else (300, options.streams, 15.0)
        results |= measure_streams(rounds, streams, seconds, options.seed)
    for part in ("incident", "gpu-incident"):
        if options.part in (part, "all"):
            seconds, settle = (6.0, 3.0) if quick else (100.0, None)
            figures = measure_incident(part, options.peer, seconds, settle, options.seed)
            results |= {f"{'gpu_' * (part == 'gpu-incident')}{name}": value for name, value in figures.items()}
    rows = [[name, f"{value:.2f}"] for name, value in results.items()]
    common.print_table("evenhand sidecar", ["figure", "value"], rows)
    common.finish("sidecar", results)


if __name__ == "__main__":
    main()
