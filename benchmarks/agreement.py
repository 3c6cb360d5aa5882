"""Does the simulator say what the real engine does? The same requests through `evenhand serve` and through `simulate`.

Three tenants with weights 1, 2 and 3 are all backlogged. So that arrivals play no part, another tenant's prompt fills the
KV cache until all requests wait, and is then aborted. The engine records its steps (`--record-steps`); the simulated
device is fitted to that recording. Compared are:

    steps     what each step computes, one by one: this does not depend on how fast the machine is
    service   of each tenant in ten windows while all are backlogged: windows of equal service in all, and of equal
              seconds. In seconds, simulated steps take the time that the fit says; that and what the machine's speed was
              around them (drift); or what each was recorded to take, which leaves out the moments between steps. So it shows
              where a difference comes from
    TTFT      the order of the tenants, and of all requests by rank

    --model DIR   a model to serve with random weights, instead of the default one
"""

import asyncio
import json
import random
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import serving

from evenhand_engine.core.step_recorder import load_steps
from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.simulator.device import Device, fit_step_time
from evenhand_engine.simulator.drift import fit_with_drift
from evenhand_engine.simulator.measures import Delivery, FloatArray, RequestRecord, cumulative_service
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.files import load_policy_directory


@dataclass(frozen=True)
class Tenant:
    """A tenant's requests are alike, so that their order among themselves changes nothing."""

    name: str
    weight: int
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def key(self) -> str:
        return f"{self.name}-tenant-key-of-the-benchmark"


TENANTS = (Tenant("small", 1, 20, 48), Tenant("middle", 2, 24, 40), Tenant("large", 3, 18, 56))
PLUG = Tenant("plug", 1, 0, 1)  # its prompt is as long as the cache
NAMES = [tenant.name for tenant in TENANTS]
POLICY = """\
apiVersion: evenhand.dev/v1alpha1
kind: TenantPolicy
metadata: {{name: {name}}}
spec:
  weight: {weight}
  kvCache: {{guaranteedPercent: {guaranteed}}}
  identities: [{{name: keys, type: APIKey, apiKey: {{secretRef: {{name: {name}-keys}}}}}}]
---
apiVersion: v1
kind: Secret
metadata: {{name: {name}-keys}}
stringData: {{key: {key}}}
"""
SLOTS = 8
STEP_TOKENS = 64
BLOCK_SIZE = 16
PLUG_BEGUN_TOKENS = 1_024  # no other request has so much context, so its steps are known in the recording
WAIT_SECONDS = 120.0


class Loader:
    """Brings the three tenants' requests to a server so that the first step of any of them finds all of them."""

    def __init__(self, server: serving.Server, num_requests: int, token_ids: range, seed: int) -> None:
        """`num_requests` of each tenant, whose prompts are drawn from `token_ids`."""
        self._server = server
        self._token_ids = token_ids
        self._num_requests = num_requests
        self._random = random.Random(seed)
        with urllib.request.urlopen(f"{server.url}/v1/models", timeout=10) as answer:
            self.max_model_len = int(json.load(answer)["data"][0]["max_model_len"])

    async def serve(self) -> list[tuple[Tenant, serving.Timing]]:
        """Fill the cache, queue all requests, clear the cache; returns when all have ended."""
        timings: list[tuple[Tenant, serving.Timing]] = []

        def send(tenant: Tenant) -> None:
            timing = serving.Timing(time.monotonic())
            timings.append((tenant, timing))
            group.create_task(self._stream(tenant, timing))

        async with asyncio.TaskGroup() as group:
            longest = replace(PLUG, num_prompt_tokens=self.max_model_len - BLOCK_SIZE)
            plug = group.create_task(self._stream(longest, serving.Timing(0.0)))
            await self._until(PLUG.name, lambda state: state.get("promptTokens", 0) > PLUG_BEGUN_TOKENS)
            for tenant in TENANTS:  # one by one: who comes first breaks ties
                send(tenant)
                await self._until(tenant.name, lambda state: state.get("waiting") == 1)
            for tenant in TENANTS:
                for _ in range(self._num_requests - 1):
                    send(tenant)
            for tenant in TENANTS:
                await self._until(tenant.name, lambda state: state.get("waiting") == self._num_requests)
            if not plug.cancel():
                raise SystemExit("the cache was free again before all requests waited; this machine is too busy")
        return timings

    async def _stream(self, tenant: Tenant, timing: serving.Timing) -> None:
        prompt = self._random.choices(self._token_ids, k=tenant.num_prompt_tokens)
        async with self._server.client(tenant.key) as client:
            await serving.stream(client, timing, prompt, tenant.num_output_tokens)

    async def _until(self, tenant_id: str, holds: Callable[[dict[str, Any]], bool]) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while not holds(await self._server.tenant(tenant_id)):
                await asyncio.sleep(0.01)


def run_real(
    directory: Path, num_requests: int, token_ids: range, flags: Sequence[str], seed: int
) -> tuple[list[RequestRecord], int]:
    """Records of the three tenants, in seconds from their first token on, and the model's context."""
    limits = ("--max-num-seqs", str(SLOTS), "--max-num-batched-tokens", str(STEP_TOKENS), "--no-enable-prefix-caching")
    record = ("--policies", str(directory), "--record-steps", str(directory / "steps.csv"))
    with serving.serve(*flags, *limits, *record) as server:
        loader = Loader(server, num_requests, token_ids, seed)
        timings = asyncio.run(loader.serve())
    start = min(timing.token_times[0] for _, timing in timings)
    return [_record(tenant, timing, start) for tenant, timing in timings], loader.max_model_len


def _record(tenant: Tenant, timing: serving.Timing, start: float) -> RequestRecord:
    """Tokens that came together, since they were held back, are spread over the time since those before."""
    lengths = tenant.num_prompt_tokens, tenant.num_output_tokens
    times = np.interp(np.arange(1, tenant.num_output_tokens + 1), timing.token_counts, timing.token_times) - start
    return RequestRecord(tenant.name, 0.0, *lengths, float(times[0]), float(times[-1]), times)


def run_simulated(directory: Path, num_requests: int, context: int, device: Device) -> Run:
    """The same requests, all there at time 0."""
    trace = [
        TraceRequest(tenant.name, 0.0, tenant.num_prompt_tokens, tenant.num_output_tokens)
        for tenant in TENANTS
        for _ in range(num_requests)
    ]
    scenario = Scenario.of_trace(trace, device, load_policy_directory(directory))
    settings = scenario.with_settings(max_model_len=context, num_kv_blocks=context // BLOCK_SIZE)
    return settings.with_settings(enable_prefix_caching=False).run("fair")


def steps_after_plug(path: Path) -> tuple[list[StepShape], list[float]]:
    """The recorded steps from the first one without the plug on."""
    shapes, seconds = load_steps(path)
    first = 1 + max(i for i, shape in enumerate(shapes) if shape.prefill_context >= PLUG_BEGUN_TOKENS)
    return shapes[first:], seconds[first:]


def first_tokens(records: Sequence[RequestRecord], name: str) -> list[float]:
    """When a tenant's requests got their first tokens, in order."""
    times = [record.first_token_time for record in records if record.tenant_id == name]
    return sorted(time for time in times if time is not None)


def start_of(records: Sequence[RequestRecord]) -> float:
    return min(first_tokens(records, name)[0] for name in NAMES)


def service_at(records: Sequence[RequestRecord], times: FloatArray) -> FloatArray:
    """`[tenants, times]`, by true token times; `times` count from the first token of all."""
    return cumulative_service(records, NAMES, times + start_of(records), Delivery.TOKENS)


def backlogged_until(records: Sequence[RequestRecord]) -> float:
    """Seconds after the first token of all at which the first of the tenants has nothing waiting any more."""
    return min(first_tokens(records, name)[-1] for name in NAMES) - start_of(records)


def largest_deviation(
    real: Sequence[RequestRecord], simulated: Sequence[RequestRecord], num_windows: int, *, by_service: bool
) -> float:
    """Of any tenant's service in any window: how far the simulated one is from the real one, over the real one."""
    until = min(backlogged_until(real), backlogged_until(simulated))
    windows = [np.linspace(0.0, until, num_windows + 1)] * 2
    if by_service:
        fine = np.linspace(0.0, until, 20_000)
        totals = [service_at(records, fine).sum(axis=0) for records in (real, simulated)]
        marks = np.linspace(0.0, min(total[-1] for total in totals), num_windows + 1)
        windows = [fine[np.searchsorted(total, marks)] for total in totals]
    ours, theirs = (
        np.diff(service_at(records, times)) for records, times in zip((simulated, real), windows[::-1], strict=True)
    )
    return float(np.abs(ours / theirs - 1.0).max())


def order_of_ttft(records: Sequence[RequestRecord]) -> list[str]:
    """The tenants, by median time to first token."""
    return sorted(NAMES, key=lambda name: median(first_tokens(records, name)))


def rank_correlation(real: Sequence[RequestRecord], simulated: Sequence[RequestRecord]) -> float:
    """Spearman's, of all requests' first tokens; a tenant's requests are alike, so they are matched in order."""
    ranks = [
        np.argsort(np.argsort(np.concatenate([first_tokens(records, name) for name in NAMES]), kind="stable"))
        for records in (real, simulated)
    ]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def shares(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Of the service while all are backlogged."""
    service = service_at(records, np.array([backlogged_until(records)]))[:, 0]
    return dict(zip(NAMES, (service / service.sum()).tolist(), strict=True))


def retimed(run: Run, seconds: FloatArray) -> list[RequestRecord]:
    """The run's records, had its steps taken these seconds."""
    simulated_ends, ends = np.cumsum(run.steps.seconds), np.cumsum(seconds)
    records = []
    for record in run.records:
        assert record.token_times is not None
        times = ends[np.searchsorted(simulated_ends, record.token_times - 1e-9)]
        records.append(replace(record, first_token_time=times[0], finish_time=times[-1], token_times=times))
    return records


def compare(
    real: Sequence[RequestRecord], run: Run, step_seconds: dict[str, FloatArray], num_windows: int
) -> dict[str, Any]:
    """What the tenants got; `*_off` are relative to the real engine, at most in any window."""
    simulated = run.records
    runs = {"real": real, "simulated": simulated}
    return {
        "service_off_by_service": largest_deviation(real, simulated, num_windows, by_service=True),
        "service_off_by_seconds": {
            name: largest_deviation(real, retimed(run, seconds), num_windows, by_service=False)
            for name, seconds in step_seconds.items()
        },
        "shares_while_backlogged": {name: shares(records) for name, records in runs.items()},
        "ttft_order": {name: order_of_ttft(records) for name, records in runs.items()},
        "ttft_rank_correlation": rank_correlation(real, simulated),
        "preemptions_simulated": sum(record.num_preemptions for record in simulated),
    }


def off(fitted: FloatArray, measured: FloatArray) -> dict[str, float]:
    """Percentiles of a single step's relative error."""
    errors = np.abs(fitted / measured - 1.0)
    return {f"p{percent}": float(np.percentile(errors, percent)) for percent in (50, 90, 99)}


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--model", help="a model to serve with random weights, instead of the default one")
    parser.add_argument("--kv-cache-memory-bytes", default="256M", help="must be less than the model's context takes")
    options = parser.parse_args()
    common.console.print(common.machine())
    num_requests, num_windows = (6, 1) if options.quick else (96, 10)
    token_ids = range(10, 250) if options.model else range(1_000, 40_000)  # any vocabulary has some; words are better
    flags = ["--kv-cache-memory-bytes", options.kv_cache_memory_bytes]
    flags += [options.model, "--load-format", "dummy"] if options.model else []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for tenant in (*TENANTS, PLUG):
            guaranteed = 100 if tenant is PLUG else 0  # so that it is never preempted
            policy = POLICY.format(name=tenant.name, weight=tenant.weight, key=tenant.key, guaranteed=guaranteed)
            (directory / f"{tenant.name}.yaml").write_text(policy)
        real, context = run_real(directory, num_requests, token_ids, flags, options.seed)
        shapes, seconds = steps_after_plug(directory / "steps.csv")
        device = Device("this machine", context, fit_step_time(shapes, seconds), None, 0, STEP_TOKENS, SLOTS)
        run = run_simulated(directory, num_requests, context, device)
    measured = np.array(seconds)
    fitted = np.array([device.seconds(shape) for shape in shapes])
    step_time, drift = fit_with_drift(shapes, measured, np.cumsum(measured))
    drifting = np.array([step_time.seconds(shape) for shape in shapes]) * drift
    step_seconds = {"fitted": np.array(run.steps.seconds)}
    if shapes == run.steps.shapes:  # else it is not known how long a simulated step took
        step_seconds |= {"with drift": drifting, "recorded": measured}
    results = {"num_windows": num_windows, **compare(real, run, step_seconds, num_windows)}
    results["num_steps"] = {"real": len(shapes), "simulated": len(run.steps.shapes)}
    results["num_steps_equal"] = sum(a == b for a, b in zip(shapes, run.steps.shapes, strict=False))
    results["step_seconds_off"] = {"fitted": off(fitted, measured), "with drift": off(drifting, measured)}
    results["drift"] = dict(zip(("p5", "p95"), np.percentile(drift, (5, 95)).tolist(), strict=True))
    rows = [(name, _shown(value)) for name, value in results.items()]
    common.print_table("Real engine against simulator", ("figure", "value"), rows)
    common.finish("agreement", results)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " < ".join(value)
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
