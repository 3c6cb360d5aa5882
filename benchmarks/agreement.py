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

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from agreement_load import NAMES, PLUG, POLICY, SLOTS, STEP_TOKENS, TENANTS, run_real, run_simulated, steps_after_plug

from evenhand_engine.simulator.device import Device, fit_step_time
from evenhand_engine.simulator.drift import fit_with_drift
from evenhand_engine.simulator.measures import Delivery, FloatArray, RequestRecord, cumulative_service
from evenhand_engine.simulator.simulation import Run


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
