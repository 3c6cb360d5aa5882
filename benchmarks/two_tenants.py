"""KVWarden's two-tenant case: a flooder at 1.5 times the capacity, a quiet tenant at 3 % of it.

Every request has 128 output tokens; arrivals are Poisson's, the same in each run. The engine is ours with the pace of an H100's
steps in place of a model (paced_engine.py): there a step takes nearly as long for one request as for all of its seats, which it
does not on these cores, whatever the model. HTTP, scheduler, sidecar and clients are real. Capacity is measured first, with twice as
many requests in flight as seats. The quiet tenant alone; beside the flood first come first served; through a sidecar
before that; and with the engine's own fair scheduling. The first seconds of each run are dropped.
"""

import asyncio
import contextlib
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import common
import incident
import serving

NUM_SEATS = 32
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128
FLOOD, QUIET = 1.5, 0.03  # of the capacity
QUIET_KEY, FLOOD_KEY = incident.CHAT_KEY, incident.BATCH_KEY
POLICIES = incident.POLICIES.replace("weight: 4", "weight: 1").replace("  slo: {interTokenLatency: 100ms}\n", "")
DEVICE, KV_TOKENS = "h100-8b", 100_000
DROPPED_SECONDS = 10.0


@dataclass
class Tenant:
    """What came back to one tenant: times to the first token, and when tokens came."""

    waits: list[tuple[float, float]] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    num_refused: int = 0

    def p(self, percent: float, since: float, until: float) -> float:
        """Of requests sent since then; one without a token counts with the time that it has waited."""
        waits = [min(wait, until - sent_at) for sent_at, wait in self.waits if sent_at >= since]
        return serving.percentile(waits, percent)


async def ask(session: aiohttp.ClientSession, url: str, key: str, tenant: Tenant, prompt: list[int]) -> None:
    body = {"model": serving.MODEL, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
    sent_at = time.monotonic()
    entry = (sent_at, float("inf"))  # until something comes
    tenant.waits.append(entry)
    headers = {"Authorization": f"Bearer {key}"}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        if response.status != 200:
            tenant.num_refused += 1
            return
        async for chunk in response.content.iter_any():
            if (num_events := chunk.count(b'"text"')) == 0:
                continue
            if entry[1] == float("inf"):
                tenant.waits.remove(entry)
                entry = (sent_at, time.monotonic() - sent_at)
                tenant.waits.append(entry)
            tenant.token_times += [time.monotonic()] * num_events


class Load:
    """The two tenants, against one server after another."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def _prompt(self, rng: random.Random) -> list[int]:
        return [rng.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)]

    async def capacity(self, url: str, seconds: float) -> float:
        """Requests a second, by tokens, of a server that has always enough to do."""
        rng, tenant = random.Random(self._seed), Tenant()

        async def forever(session: aiohttp.ClientSession) -> None:
            while True:
                await ask(session, url, FLOOD_KEY, tenant, self._prompt(rng))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks = [asyncio.create_task(forever(session)) for _ in range(2 * NUM_SEATS)]
            await asyncio.sleep(seconds)
            await serving.cancel(tasks)
        since = time.monotonic() - seconds / 2
        return sum(at >= since for at in tenant.token_times) / (seconds / 2) / OUTPUT_TOKENS

    async def run(self, url: str, rates: dict[str, float], seconds: float) -> dict[str, Tenant]:
        """Send at these rates for so long; what is not answered then counts as it is."""
        tenants = {key: Tenant() for key in rates}

        async def arrive(
            key: str, rate: float, session: aiohttp.ClientSession, group: list[asyncio.Task[None]]
        ) -> None:
            rng, due = random.Random(f"{self._seed} {key}"), time.monotonic()
            while True:
                due += rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.append(asyncio.create_task(ask(session, url, key, tenants[key], self._prompt(rng))))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks: list[asyncio.Task[None]] = []
            arrivals = [asyncio.create_task(arrive(key, rate, session, tasks)) for key, rate in rates.items()]
            await asyncio.sleep(seconds)
            await serving.cancel([*arrivals, *tasks])
        return tenants


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=70.0, help="of each run")
    options = parser.parse_args()
    seconds = 6.0 if options.quick else options.seconds
    dropped, load = min(DROPPED_SECONDS, seconds / 4), Load(options.seed)
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "policies.yaml").write_text(POLICIES)
        flags = ["--max-num-seqs", str(NUM_SEATS), "--max-model-len", "1024"]
        policies = ["--policies", directory]
        with serving.paced(DEVICE, KV_TOKENS, *flags, "--scheduling-policy", "fcfs") as engine:
            capacity = asyncio.run(load.capacity(engine.url, min(12.0, seconds)))
            alone = asyncio.run(load.run(engine.url, {QUIET_KEY: QUIET * capacity}, seconds))
        rates = {FLOOD_KEY: FLOOD * capacity, QUIET_KEY: QUIET * capacity}
        runs = {"alone": (alone, time.monotonic() - seconds)}
        for name in ("fcfs", "sidecar", "fair"):
            with contextlib.ExitStack() as stack:
                policy = "fair" if name == "fair" else "fcfs"
                own = policies if name == "fair" else []
                server = stack.enter_context(
                    serving.paced(DEVICE, KV_TOKENS, *flags, *own, "--scheduling-policy", policy)
                )
                if name == "sidecar":
                    seats = ["--max-num-seqs", str(NUM_SEATS)]
                    server = stack.enter_context(serving.sidecar(server.url, *policies, *seats))
                runs[name] = asyncio.run(load.run(server.url, rates, seconds)), time.monotonic() - seconds
    rows = []
    for name, (tenants, began) in runs.items():
        quiet, flood = tenants[QUIET_KEY], tenants.get(FLOOD_KEY, Tenant())
        since = began + dropped
        results[f"{name}_quiet_p95_ms"] = 1e3 * quiet.p(95, since, began + seconds)
        results[f"{name}_quiet_p50_ms"] = 1e3 * quiet.p(50, since, began + seconds)
        results[f"{name}_quiet_p99_ms"] = 1e3 * quiet.p(99, since, began + seconds)
        results[f"{name}_flood_tokens"] = sum(at >= since for at in flood.token_times)
        results[f"{name}_refused"] = quiet.num_refused + flood.num_refused
        results[f"{name}_quiet_requests"] = sum(sent_at >= since for sent_at, _ in quiet.waits)
        rows.append([name, *(f"{results[f'{name}_{what}']:.0f}" for what in _COLUMNS)])
    common.print_table(f"Two tenants; capacity {capacity:.1f} requests/s", ["", *_COLUMNS], rows)
    results["capacity_requests_per_s"] = capacity
    results["quiet_p99_over_alone"] = results["sidecar_quiet_p99_ms"] / results["alone_quiet_p99_ms"]
    results["flood_tokens_ratio"] = results["sidecar_flood_tokens"] / results["fcfs_flood_tokens"]
    results["fair_quiet_p99_over_alone"] = results["fair_quiet_p99_ms"] / results["alone_quiet_p99_ms"]
    results["fair_flood_tokens_ratio"] = results["fair_flood_tokens"] / results["fcfs_flood_tokens"]
    common.finish("two_tenants", results)


_COLUMNS = ["quiet_p50_ms", "quiet_p95_ms", "quiet_p99_ms", "flood_tokens", "refused", "quiet_requests"]


if __name__ == "__main__":
    main()
