"""The sidecar: what it adds to a stream, what it costs, and the incident before an engine that is first come, first served.

`--part streams`. Alone: one request after another, by turns and in random order straight to a scripted upstream and through the
sidecar; paired differences of the time to first token. Many: N streams at 20 events of 180 bytes a second each; gaps between
events at the client beside those without a sidecar, the sidecar's processor time by event, and its memory by stream.

`--part processes`. The same N streams, twice as many if not said otherwise, by one process and by two with an owner of queue and quotas
(`--api-server-count 2`): gaps, events by processor time of all of them, and by that of the owner alone, which all streams share.

`--part incident`. A chat beside a flood that keeps 16 long prompts in flight, before our engine under `fcfs`, without and with a
sidecar by turns (turns.py): 640 + 10 tokens beside 16 + 16 each 1.5 s, in steps of 160 tokens, a quarter of such a prompt as 2,048 are
of 8,000. With `--peer llama.cpp`, llama.cpp's server in its place, and prompts by how fast it is.

`--part gpu-incident`. The same with 8,000 + 16 tokens beside 200 + 100 a second, before our engine at the pace of an H100 (paced_engine.py).

Upstream, sidecar and client share this machine. Streams: where it has two cores, the sidecar has one of them to itself; processes: nobody has.
"""

import contextlib
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import common
import event_streams
import serving
from sidecar_incident import ON_GPU, SCALED, PeerIncident, Plan, SidecarIncident, figures


def paired_ttft(direct: str, through: str, rounds: int, rng: random.Random) -> list[float]:
    """Seconds that the sidecar adds to the first event of a lone request; the first tenth is warm-up."""
    added = []
    for _ in range(rounds):
        times = {}
        for url in rng.sample([direct, through], 2):
            times[url] = event_streams.time_to_first_event(url)
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


def family(pid: int) -> list[int]:
    """The process, and those that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [pid, *(each for child in children for each in family(int(child)))]


def measure_processes(rounds: int, num_streams: int, seconds: float, seed: int) -> dict[str, float]:
    results: dict[str, float] = {}
    num_events = num_streams * int(seconds * event_streams.EVENTS_PER_SECOND)
    with contextlib.ExitStack() as stack:
        direct = stack.enter_context(scripted_upstream())
        for count in (1, 2):
            with serving.sidecar(direct, "--api-server-count", str(count)) as server:
                if count == 1:
                    alone = event_streams.gaps(direct, num_streams, seconds)
                    results["processes_gap_direct_p99_ms"] = 1e3 * serving.percentile(alone, 99)
                added = paired_ttft(direct, server.url, rounds, random.Random(seed))
                pids = family(server.pid)
                before = [processor_seconds(pid) for pid in pids]
                through = event_streams.gaps(server.url, num_streams, seconds)
                used = [processor_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
            name = f"processes_{count}"
            results[f"{name}_ttft_added_p50_ms"] = 1e3 * median(added)
            results[f"{name}_gap_p99_ms"] = 1e3 * serving.percentile(through, 99)
            results[f"{name}_events_per_s_per_core"] = num_events / sum(used)
            if count > 1:
                results[f"{name}_events_per_s_of_owner"] = num_events / used[0]
    return results | {"processes_num_streams": num_streams}


def measure_streams(rounds: int, num_streams: int, seconds: float, seed: int) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))
        stack.enter_context(common.on_cores(cores[:-1] or cores))
        direct = stack.enter_context(scripted_upstream())
        with common.on_cores(cores[-1:]):
            server = stack.enter_context(serving.sidecar(direct))
        added = paired_ttft(direct, server.url, rounds, random.Random(seed))
        idle, memory = resident_kib(server.pid), 0

        def look() -> None:
            nonlocal memory
            memory = resident_kib(server.pid)

        alone = event_streams.gaps(direct, num_streams, seconds)
        used = processor_seconds(server.pid)
        through = event_streams.gaps(server.url, num_streams, seconds, look)
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


def measure_incident(part: str, peer: str | None, seed: int, *, is_quick: bool) -> dict[str, float]:
    plan = Plan(seconds=3.0, num_pairs=2, max_seconds=0.0) if is_quick else Plan()
    with tempfile.TemporaryDirectory() as directory:
        if peer is not None:
            on_peer = PeerIncident(seed, Path(directory), SCALED)
            pairs = on_peer.before_peer(plan)
            return figures(pairs) | {
                "batch_prompt": on_peer.traffic.batch_prompt,
                "chat_interval_s": on_peer.traffic.chat_interval,
            }
        if part == "gpu-incident":
            return figures(SidecarIncident(seed, Path(directory), ON_GPU).before_ours(plan, is_paced=True))
        budget = ["--max-num-batched-tokens", str(SCALED.batch_prompt // 4)]
        return figures(SidecarIncident(seed, Path(directory), SCALED).before_ours(plan, *budget, is_paced=False))


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--part", choices=["streams", "processes", "incident", "gpu-incident", "all"], default="all")
    parser.add_argument("--peer", choices=["llama.cpp"], help="the engine of the incident; default: ours")
    options = parser.parse_args()
    quick, results = options.quick, dict[str, float]()
    if options.part in ("streams", "all"):
        rounds, streams, seconds = (20, 50, 3.0) if quick else (300, options.streams, 15.0)
        results |= measure_streams(rounds, streams, seconds, options.seed)
    if options.part in ("processes", "all"):
        rounds, streams, seconds = (20, 50, 3.0) if quick else (300, 2 * options.streams, 15.0)
        results |= measure_processes(rounds, streams, seconds, options.seed)
    for part in ("incident", "gpu-incident"):
        if options.part in (part, "all"):
            found = measure_incident(part, options.peer, options.seed, is_quick=quick)
            results |= {f"{'gpu_' * (part == 'gpu-incident')}{name}": value for name, value in found.items()}
    rows = [[name, f"{value:.3f}"] for name, value in results.items()]
    common.print_table("evenhand sidecar", ["figure", "value"], rows)
    common.finish("sidecar", results)


if __name__ == "__main__":
    main()
