"""KVWarden's two-tenant case: a flooder at 1.5 times the capacity, a quiet tenant at 3 % of it.

Every request has 128 output tokens; arrivals are Poisson's, the same in each run. The engine is ours with the pace of an H100's
steps in place of a model (paced_engine.py): there a step takes nearly as long for one request as for some, which it
does not on these cores, whatever the model. HTTP, scheduler, sidecar and clients are real. Capacity is measured first, with twice as
many requests in flight as seats. The quiet tenant alone; beside the flood first come first served; through a sidecar
before that; and with the engine's own fair scheduling. The first seconds of each run are dropped.

What no order can go below: the step that runs when a request comes ends first, and its own follows. `floor_over_alone` says by how
much two steps of all seats are longer than two of one request.
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

from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.simulator.device import DEVICES

NUM_SEATS = 64
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128
FLOOD, QUIET = 1.5, 0.03  # of the capacity
QUIET_KEY, FLOOD_KEY = incident.CHAT_KEY, incident.BATCH_KEY
POLICIES = incident.POLICIES.replace("weight: 4", "weight: 1").replace("  slo: {interTokenLatency: 100ms}\n", "")
DEVICE, KV_TOKENS = "h100-8b", 100_000
DROPPED_SECONDS = 10.0
ALONE_SECONDS = 80.0  # a wait is never longer than two steps
FCFS_SECONDS = 40.0  # only the flood's rate counts


@dataclass
class Wait:
    """When a request was sent, and how long its first token took; infinite: none has come."""

    sent_at: float
    seconds: float = float("inf")


@dataclass
class Tenant:
    """What came back to one tenant: times to the first token, and when tokens came."""

    waits: list[Wait] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    num_refused: int = 0


@dataclass
class Run:
    """Both tenants against one server, between two moments."""

    tenants: dict[str, Tenant]
    since: float
    until: float

    def waits_ms(self) -> list[float]:
        """Of the quiet tenant's requests; one without a token counts with the time that it has waited."""
        waits = self.tenants[QUIET_KEY].waits
        return [1e3 * min(w.seconds, self.until - w.sent_at) for w in waits if w.sent_at >= self.since]

    def results(self) -> dict[str, float]:
        waits, flood = self.waits_ms(), self.tenants.get(FLOOD_KEY, Tenant())
        num_tokens = sum(self.since <= at < self.until for at in flood.token_times)
        return {f"quiet_p{percent}_ms": serving.percentile(waits, percent) for percent in (50, 95, 99)} | {
            "flood_tokens_per_s": num_tokens / (self.until - self.since),
            "refused": sum(tenant.num_refused for tenant in self.tenants.values()),
            "quiet_requests": len(waits),
        }


async def ask(session: aiohttp.ClientSession, url: str, key: str, tenant: Tenant, prompt: list[int]) -> None:
    body = {"model": serving.MODEL, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
    wait = Wait(time.monotonic())
    tenant.waits.append(wait)
    headers = {"Authorization": f"Bearer {key}"}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        if response.status != 200:
            tenant.num_refused += 1
            return
        async for chunk in response.content.iter_any():
            if (num_events := chunk.count(b'"text"')) == 0:
                continue
            wait.seconds = min(wait.seconds, time.monotonic() - wait.sent_at)
            tenant.token_times += [time.monotonic()] * num_events


class Load:
    """The two tenants, against one server after another."""

    def __init__(self, seed: int, num_seats: int) -> None:
        self._seed = seed
        self._num_seats = num_seats

    def _prompt(self, rng: random.Random) -> list[int]:
        return [rng.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)]

    async def capacity(self, url: str, seconds: float) -> float:
        """Requests a second, by tokens, of a server that has always enough to do."""
        rng, tenant = random.Random(self._seed), Tenant()

        async def forever(session: aiohttp.ClientSession) -> None:
            while True:
                await ask(session, url, FLOOD_KEY, tenant, self._prompt(rng))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks = [asyncio.create_task(forever(session)) for _ in range(2 * self._num_seats)]
            await asyncio.sleep(seconds)
            await serving.cancel(tasks)
        since = time.monotonic() - seconds / 2
        return sum(at >= since for at in tenant.token_times) / (seconds / 2) / OUTPUT_TOKENS

    async def run(self, url: str, rates: dict[str, float], seconds: float) -> Run:
        """Send at these rates for so long; what is not answered then counts as it is."""
        tenants, began = {key: Tenant() for key in rates}, time.monotonic()

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
            until = time.monotonic()
            await serving.cancel([*arrivals, *tasks])
        return Run(tenants, began + min(DROPPED_SECONDS, seconds / 4), until)


def floor_over_alone(num_seats: int) -> float:
    """Two steps, the latter with a prompt, of all seats over those of a request alone, halfway through their outputs."""

    def two_steps(num_streams: int) -> float:
        step = StepShape().with_decodes(num_streams, num_streams * (PROMPT_TOKENS + OUTPUT_TOKENS // 2))
        return DEVICES[DEVICE].seconds(step) + DEVICES[DEVICE].seconds(step.with_chunk(PROMPT_TOKENS, 0))

    return two_steps(num_seats - 1) / two_steps(1)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=170.0, help="of the runs beside the flood")
    parser.add_argument("--seats", type=int, default=NUM_SEATS)
    parser.add_argument("--scheduler", choices=["sidecar", "fair"], help="that one alone; default: both")
    options = parser.parse_args()
    longest = 6.0 if options.quick else options.seconds
    load, num_seats = Load(options.seed, options.seats), options.seats
    seats = ["--max-num-seqs", str(num_seats)]
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "policies.yaml").write_text(POLICIES)
        policies = ["--policies", directory]

        def engine(policy: str, *flags: str) -> contextlib.AbstractContextManager[serving.Server]:
            flags = (*seats, "--max-model-len", "1024", "--scheduling-policy", policy, *flags)
            return serving.paced(DEVICE, KV_TOKENS, *flags)

        with engine("fcfs") as server:
            capacity = asyncio.run(load.capacity(server.url, min(12.0, longest)))
            rates = {FLOOD_KEY: FLOOD * capacity, QUIET_KEY: QUIET * capacity}
            alone = {QUIET_KEY: rates[QUIET_KEY]}
            runs["alone"] = asyncio.run(load.run(server.url, alone, min(ALONE_SECONDS, longest)))
            runs["fcfs"] = asyncio.run(load.run(server.url, rates, min(FCFS_SECONDS, longest)))
        if options.scheduler != "fair":
            with engine("fcfs") as upstream, serving.sidecar(upstream.url, *policies, *seats) as server:
                runs["sidecar"] = asyncio.run(load.run(server.url, rates, longest))
        if options.scheduler != "sidecar":
            with engine("fair", *policies) as server:
                runs["fair"] = asyncio.run(load.run(server.url, rates, longest))
    figures = {name: run.results() for name, run in runs.items()}
    columns = list(figures["alone"])
    rows = [[name, *(f"{of_run[column]:.0f}" for column in columns)] for name, of_run in figures.items()]
    common.print_table(f"Two tenants; capacity {capacity:.1f} requests/s", ["", *columns], rows)
    results = {f"{name}_{column}": value for name, of_run in figures.items() for column, value in of_run.items()}
    for name, prefix in (("sidecar", ""), ("fair", "fair_")):
        if name in figures:
            for percent in (50, 99):
                ratio = figures[name][f"quiet_p{percent}_ms"] / figures["alone"][f"quiet_p{percent}_ms"]
                results[f"{prefix}quiet_p{percent}_over_alone"] = ratio
            ratio = figures[name]["flood_tokens_per_s"] / figures["fcfs"]["flood_tokens_per_s"]
            results[f"{prefix}flood_tokens_ratio"] = ratio
    results |= {"capacity_requests_per_s": capacity, "floor_over_alone": floor_over_alone(num_seats)}
    common.finish("two_tenants", results)


if __name__ == "__main__":
    main()
