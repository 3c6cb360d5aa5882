"""The published table: the Arena trace on the A10G preset under the published schedulers and under ours.

Every policy is run on the preset and on devices whose step times differ from it by up to 1 %, because a run is chaotic:
the figures are medians. Beside them: what was measured on a real A10G, and what ideal sharing of the same capacity scores.

    --calibrate   fit the preset to the measured FCFS run again, and print it
    --plot FILE   write the service of the busiest tenants over time
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import numpy as np
from common import DATA, arguments, console, finish, machine, print_table

from evenhand_engine.simulator.calibration import calibrate, mean_finish_error
from evenhand_engine.simulator.device import DEVICES, perturbed
from evenhand_engine.simulator.fluid import FluidShare, StreamLimitedFluid
from evenhand_engine.simulator.measures import (
    Delivery,
    RequestRecord,
    ServiceDifference,
    cumulative_service,
    service_difference,
    tenant_ids,
    throughput,
)
from evenhand_engine.simulator.report import plot_service
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run
from evenhand_engine.simulator.traces import load_measured_run, load_trace

A10G = DEVICES["a10g-llama-2-7b"]
CONTEXT = 2_048
BASELINES = ("published-fcfs", "lcf", "rpm:5", "rpm:10", "rpm:15", "rpm:20", "rpm:30", "drr", "vtc", "vtc-oracle")
OURS = ("fcfs", "fair")
PUBLISHED = {  # max, mean, tokens/s and served, recomputed from the artifact's recorded runs
    "published-fcfs": (759.97, 433.5, 777, 1_500),
    "lcf": (750.5, 323.8, 778, 1_500),
    "vtc": (368.4, 251.7, 779, 1_500),
    "vtc-oracle": (329.5, 227.5, 781, 1_500),
    "rpm:5": (144, 84, 340, 581),
    "rpm:10": (218, 128, 532, 900),
    "rpm:15": (343, 161, 626, 1_053),
    "rpm:20": (447, 196, 694, 1_158),
    "rpm:30": (694, 309, 747, 1_324),
}


@dataclass(frozen=True)
class Figures:
    """Medians over the runs of one policy; `lowest` and `highest` are of the maximum difference."""

    max_difference: float
    mean_difference: float
    max_difference_true: float
    mean_difference_true: float
    tokens_per_s: float
    served: float
    preemptions: float
    lowest: float
    highest: float


def arena(seed: int) -> Scenario:
    """The trace on the preset, or near it for a seed above 0."""
    scenario = Scenario.of_trace(load_trace(DATA / "arena_trace.csv"), perturbed(A10G, seed))
    return scenario.with_settings(max_model_len=CONTEXT, enable_prefix_caching=False)


def simulate(policy: str, seed: int) -> Run:
    """One run, in a process of its own."""
    return arena(seed).run(policy)


def figures(runs: Sequence[Run]) -> Figures:
    """The published metric of each run, and its median."""
    spread = [service_difference(run.records) for run in runs]
    true = [service_difference(run.records, delivery=Delivery.TOKENS) for run in runs]
    return Figures(
        max_difference=median(d.maximum for d in spread),
        mean_difference=median(d.mean for d in spread),
        max_difference_true=median(d.maximum for d in true),
        mean_difference_true=median(d.mean for d in true),
        tokens_per_s=median(throughput(run.records) for run in runs),
        served=median(sum(record.is_served for record in run.records) for run in runs),
        preemptions=median(sum(record.num_preemptions for record in run.records) for run in runs),
        lowest=min(d.maximum for d in spread),
        highest=max(d.maximum for d in spread),
    )


def ideals(run: Run) -> dict[str, dict[str, float]]:
    """What ideal max-min sharing of the service per second that `run` delivered scores by the same measures: of service
    that can be divided at will, and of streams that get one token a step."""
    records = run.records
    until = np.array([600.0])
    capacity = float(cumulative_service(records, tenant_ids(records), until, Delivery.TOKENS).sum()) / 600.0
    decodes = [s for s, shape in zip(run.steps.seconds, run.steps.shapes, strict=True) if shape.num_decode_tokens]
    fluid = FluidShare(records, capacity).service_difference(records)
    streams = StreamLimitedFluid(records, capacity, fmean(decodes))
    spread, true = (streams.service_difference(delivery=delivery) for delivery in (Delivery.SPREAD, Delivery.TOKENS))
    return {
        "one_token_a_step": measures(spread, true),
        "divisible": measures(fluid, fluid),
    }


def measures(spread: ServiceDifference, true: ServiceDifference) -> dict[str, float]:
    """By the names that `Figures` has."""
    return {
        "max_difference": spread.maximum,
        "mean_difference": spread.mean,
        "max_difference_true": true.maximum,
        "mean_difference_true": true.mean,
    }


def recalibrate() -> None:
    """Fit the preset to the measured FCFS run, and say how well it meets both measured runs."""
    measured = {name: load_measured_run(DATA / f"vtc_paper_{name}_arena.csv") for name in ("fcfs", "vtc")}
    trace = load_trace(DATA / "arena_trace.csv")
    device = calibrate(A10G, lambda d: Scenario.of_trace(trace, d).run("published-fcfs"), measured["fcfs"])
    console.print(device.small_step)
    for policy, name in (("published-fcfs", "fcfs"), ("vtc", "vtc")):
        error = mean_finish_error(Scenario.of_trace(trace, device).run(policy).records, measured[name])
        console.print(f"{policy}: a request's finish is off by {error:.1f} s on average")


def validation(records: dict[str, Sequence[RequestRecord]]) -> dict[str, float]:
    """How far the unperturbed simulation is from the measured runs, in percent; printed."""
    off = {}
    for policy in ("published-fcfs", "vtc"):
        simulated = service_difference(records[policy])
        maximum, mean, tokens_per_s, _ = PUBLISHED[policy]
        values = (simulated.maximum / maximum, simulated.mean / mean, throughput(records[policy]) / tokens_per_s)
        for name, ratio in zip(("max", "mean", "tokens_per_s"), values, strict=True):
            off[f"{policy}_{name}_off_percent"] = round(100 * (ratio - 1), 1)
    for policy in ("published-fcfs", "vtc"):
        shown = ", ".join(
            f"{name} {off[f'{policy}_{name}_off_percent']:+.1f} %" for name in ("max", "mean", "tokens_per_s")
        )
        console.print(f"Simulated against measured on a real A10G: {policy}: {shown}")
    return off


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--runs", type=int, default=9, help="devices that each policy is run on")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    console.print(machine())
    if options.calibrate:
        recalibrate()
        return
    num_runs = 1 if options.quick else options.runs
    first: dict[str, Run] = {}
    table: dict[str, Figures] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        jobs = {
            policy: [processes.submit(simulate, policy, seed) for seed in range(num_runs)]
            for policy in (*BASELINES, *OURS)
        }
        for policy, submitted in jobs.items():
            runs = [job.result() for job in submitted]
            first[policy], table[policy] = runs[0], figures(runs)
    ideal = ideals(first["fcfs"])
    rows = [_row(policy, found) for policy, found in table.items()]
    for name, values in ideal.items():
        shown = [f"{value:.0f}" for value in values.values()]
        rows.append((f"ideal: {name.replace('_', ' ')}", shown[0], "", *shown[1:], *[""] * 4))
    headings = (
        "policy",
        "max",
        "(range)",
        "mean",
        "true max",
        "true mean",
        "tok/s",
        "served",
        "preempted",
        "measured max / mean",
    )
    print_table(f"Arena trace, A10G / Llama-2-7B, {A10G.num_kv_tokens:,} KV tokens, {num_runs} runs", headings, rows)
    off = validation({policy: run.records for policy, run in first.items()})
    if options.plot:
        plot_service(options.plot, {policy: first[policy] for policy in ("fcfs", "vtc", "fair")})
    over = {name: vars(table["fair"])[name] / value for name, value in ideal["one_token_a_step"].items()}
    console.print("fair over the ideal: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items()))
    results: dict[str, object] = {policy: vars(found) for policy, found in table.items()}
    finish("arena", {"policies": results, "ideal": ideal, "fair_over_ideal": over, "validation": off})


def _row(policy: str, found: Figures) -> tuple[str, ...]:
    measured = PUBLISHED.get(policy)
    return (
        policy,
        f"{found.max_difference:.0f}",
        f"{found.lowest:.0f}-{found.highest:.0f}",
        f"{found.mean_difference:.0f}",
        f"{found.max_difference_true:.0f}",
        f"{found.mean_difference_true:.0f}",
        f"{found.tokens_per_s:.0f}",
        f"{found.served:,.0f}",
        f"{found.preemptions:,.0f}",
        f"{measured[0]:.0f} / {measured[1]:.0f}" if measured else "",
    )


if __name__ == "__main__":
    main()
