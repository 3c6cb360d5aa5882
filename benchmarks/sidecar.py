"""The sidecar: what it adds to a stream, what it costs, and the incident before an engine that is first come, first served.

Three parts. Alone: one request after another, by turns and in random order straight to a scripted upstream and through the
sidecar; paired differences of the time to first token. Many: N streams at 20 events of 180 bytes a second each; gaps between
events at the client beside those without a sidecar, the sidecar's processor time by event, and its memory by stream. The
incident of `make bench-incident`, with our engine under `fcfs`, without and with a sidecar before it. Upstream, sidecar and
client share this machine, so gaps beyond what its cores carry are the machine's.
"""

import asyncio
import json
import multiprocessing
import os
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import aiohttp
import common
import incident
import serving
from aiohttp import web

EVENTS_PER_SECOND = 20
EVENT_BYTES = 180


def run_upstream(port: int) -> None:
    """A process that streams `max_tokens` events, `interval` seconds apart, to whoever asks."""
    text = json.dumps({"id": "x", "choices": [{"index": 0, "delta": {"content": "y"}}]})
    event = f'data: {text[:-1]}, "pad": "{"z" * (EVENT_BYTES - len(text) - 19)}"}}\n\n'.encode()

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        due = time.monotonic()
        for _ in range(body["max_tokens"]):
            await response.write(event)
            due += body["interval"]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def well(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/v1/completions", answer), web.get("/health", well)])
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, handler_cancellation=True)


async def stream(session: aiohttp.ClientSession, url: str, num_events: int, interval: float) -> list[float]:
    """Times since the request was sent at which events came; at least the first."""
    sent_at, times = time.monotonic(), []
    body = {"prompt": "hello", "stream": True, "max_tokens": num_events, "interval": interval}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for chunk in response.content.iter_any():
            times += [time.monotonic() - sent_at] * chunk.count(b'"pad"')
    return times


async def paired_ttft(direct: str, through: str, rounds: int, rng: random.Random) -> list[float]:
    """Seconds that the sidecar adds to the first event of a lone request; the first tenth is warm-up."""
    added = []
    async with aiohttp.ClientSession() as session:
        for _ in range(rounds):
            times = {}
            for url in rng.sample([direct, through], 2):
                times[url] = (await stream(session, url, 1, 0.0))[0]
            added.append(times[through] - times[direct])
    return added[rounds // 10 :]


async def many(url: str, num_streams: int, seconds: float, pid: int | None = None) -> tuple[list[float], int]:
    """Gaps between events of all streams, and the resident memory of `pid` in KiB while they run."""
    num_events, memory = int(seconds * EVENTS_PER_SECOND), 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = []
        for _ in range(num_streams):
            tasks.append(asyncio.create_task(stream(session, url, num_events, 1 / EVENTS_PER_SECOND)))
            await asyncio.sleep(1 / num_streams)  # spread over the first second
        if pid is not None:
            await asyncio.sleep(seconds / 2)
            memory = resident_kib(pid)
        times = await asyncio.gather(*tasks)
    return [later - earlier for events in times for earlier, later in pairwise(events[EVENTS_PER_SECOND:])], memory


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def overhead(rounds: int, num_streams: int, seconds: float, seed: int) -> dict[str, float]:
    port = serving.free_port()
    upstream = multiprocessing.get_context("spawn").Process(target=run_upstream, args=(port,), daemon=True)
    upstream.start()
    try:
        direct = f"http://127.0.0.1:{port}"
        with serving.sidecar(direct) as server:
            added = asyncio.run(paired_ttft(direct, server.url, rounds, random.Random(seed)))
            idle = resident_kib(server.pid)
            alone, _ = asyncio.run(many(direct, num_streams, seconds))
            used = processor_seconds(server.pid)
            through, memory = asyncio.run(many(server.url, num_streams, seconds, server.pid))
            used = processor_seconds(server.pid) - used
    finally:
        upstream.kill()
        upstream.join()
    num_events = num_streams * int(seconds * EVENTS_PER_SECOND)
    return {
        "ttft_added_p50_ms": 1e3 * median(added),
        "ttft_added_p99_ms": 1e3 * serving.percentile(added, 99),
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


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--streams", type=int, default=1000, help="of the second part")
    parser.add_argument("--without-incident", action="store_true", help="the first two parts alone")
    options = parser.parse_args()
    quick = options.quick
    results = overhead(20 if quick else 300, 50 if quick else options.streams, 3.0 if quick else 15.0, options.seed)
    if not options.without_incident:
        seconds, settle = (6.0, 3.0) if quick else (45.0, None)
        with tempfile.TemporaryDirectory() as directory:
            load = SidecarIncident(options.seed, Path(directory))
            fcfs = load.run("fcfs", seconds=seconds, settle=settle)
            through = load.run_through(seconds, settle)
        before, after = (outcome.results()["chat_ttft_p95_s"] for outcome in (fcfs, through))
        assert before is not None and after is not None
        results |= {
            "chat_p95_fcfs_s": before,
            "chat_p95_s": after,
            "chat_p95_improvement": before / after,
            "tokens_ratio": through.tokens_per_s / fcfs.tokens_per_s,
        }
    rows = [[name, f"{value:.2f}"] for name, value in results.items()]
    common.print_table("evenhand sidecar", ["figure", "value"], rows)
    common.finish("sidecar", results)


if __name__ == "__main__":
    main()
