"""Continuous against static batching, with lengths of ShareGPT conversations: on the real model, and simulated.

Static batching runs a batch to the end of its longest request before the next one starts; continuous batching refills a
slot in the step after it falls free.

On the real model a closed loop keeps twice as many requests in the engine as there are slots. Lengths are divided by 16,
so that a run takes minutes on a CPU; their spread, which is what matters, stays. On a CPU a step's cost grows with its
batch, so less is gained than on a GPU, where idle slots cost as much as busy ones.

The simulation (A10G / Llama-2-7B) takes the lengths as they are, and says where the gain comes from:

    equal slots    both have 16; the gain is bounded by longest over mean output of a batch
    equal memory   static reserves a whole context for each slot, so that few fit; continuous does so too (what
                   scheduling gains), or takes pages as requests grow (what paging gains on top); the shorter
                   conversations are against the context, the more: see the first turns of Chatbot Arena

    --simulated    leave the real model out
"""

import csv
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from statistics import fmean
from typing import Any

import common

from evenhand_engine.config import EngineConfig, SchedulingPolicy
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.simulator.device import DEVICES, Device
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.traces import TraceRequest, load_trace
from evenhand_policy.config import SchedulerConfig

NUM_SLOTS = 16
SHRINK = 16
A10G = DEVICES["a10g-llama-2-7b"]
CONTEXT = 4_096  # of Llama 2; conversations beyond it are left out
BATCHES = 100

Lengths = tuple[int, int]  # prompt and output tokens


@dataclass(frozen=True)
class Outcome:
    """One run. `running`: how many requests a step serves on average."""

    output_tokens_per_s: float
    running: float


def lengths(seed: int) -> list[Lengths]:
    """ShareGPT's, in random order."""
    with (common.DATA / "sharegpt_lengths.csv").open(encoding="utf-8") as file:
        rows = [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
    random.Random(seed).shuffle(rows)
    return rows


# -- on the real model


def serve(policy: SchedulingPolicy, seconds: float, seed: int) -> Outcome:
    """Serve the closed loop for some seconds, then until the batch under way has ended."""
    from evenhand_engine.core.loading import load_model  # imports torch, which only these processes need

    config = EngineConfig(scheduling_policy=policy, max_num_seqs=NUM_SLOTS, enable_prefix_caching=False)
    model = load_model(config)
    scheduler = Scheduler(model.settings, SchedulerConfig())
    pending, rng = iter(lengths(seed)), random.Random(seed)
    num_added = num_outputs = num_steps = num_scheduled = 0
    started_at = time.monotonic()
    while (now := time.monotonic()) < started_at + seconds or (
        policy is SchedulingPolicy.STATIC and scheduler.request_table.num_running > 0
    ):
        while len(scheduler.request_table.requests) < 2 * NUM_SLOTS:
            num_prompt_tokens, num_output_tokens = (max(1, length // SHRINK) for length in next(pending))
            prompt = [rng.randrange(1000, 40000) for _ in range(num_prompt_tokens)]
            params = SamplingParams(max_tokens=num_output_tokens, temperature=0)
            scheduler.add(Request(f"r{num_added}", "default", prompt, params, now), now)
            num_added += 1
        batch = scheduler.step(now)
        assert batch is not None
        model.runner.submit(batch)
        outputs = scheduler.update(model.runner.collect(), time.monotonic())
        num_outputs += sum(len(output.token_ids) for output in outputs)
        num_scheduled += len(batch.scheduled)
        num_steps += 1
    elapsed = time.monotonic() - started_at
    return Outcome(num_outputs / elapsed, num_scheduled / num_steps)


def real_model(seconds: float, seed: int) -> dict[str, Any]:
    """Both on the default model. A process for each, so that what the first leaves behind cannot touch the second."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as process:
        static, continuous = (
            process.submit(serve, policy, seconds, seed).result()
            for policy in (SchedulingPolicy.STATIC, SchedulingPolicy.FCFS)
        )
    outcomes = {"static": static, "continuous": continuous}
    show(f"Real model: ShareGPT lengths / {SHRINK}, {NUM_SLOTS} slots", outcomes, static)
    return {
        "continuous_over_static": continuous.output_tokens_per_s / static.output_tokens_per_s,
        "output_tokens_per_s": {name: outcome.output_tokens_per_s for name, outcome in outcomes.items()},
        "slot_utilisation": {name: outcome.running / NUM_SLOTS for name, outcome in outcomes.items()},
    }


# -- simulated


def simulate(policy: SchedulingPolicy, requests: Sequence[Lengths], device: Device, slots: int) -> Outcome:
    """All requests wait from the start, so that only batching decides how long they take."""
    trace = [TraceRequest("default", 0.0, prompt, output) for prompt, output in requests]
    scenario = Scenario.of_trace(trace, device)
    run = scenario.with_settings(max_num_seqs=slots, max_model_len=CONTEXT, enable_prefix_caching=False).run(policy)
    outputs = sum(output for _, output in requests)
    return Outcome(outputs / run.end_time, fmean(shape.num_decode_tokens for shape in run.steps.shapes))


def with_room_for(slots: int) -> Device:
    """The A10G with memory that never binds: as many contexts as there are slots, and room to grow."""
    return replace(A10G, num_kv_tokens=2 * slots * CONTEXT)


def bound(requests: Sequence[Lengths], slots: int) -> float:
    """What continuous batching can gain with these slots: longest over mean output of a static batch, by steps."""
    batches = [[output for _, output in requests[i : i + slots]] for i in range(0, len(requests), slots)]
    return sum(max(batch) for batch in batches) / sum(fmean(batch) for batch in batches)


def equal_slots(requests: Sequence[Lengths], slots: int) -> dict[str, Any]:
    """Memory for all: what scheduling alone gains."""
    static, continuous = (
        simulate(policy, requests, with_room_for(slots), slots)
        for policy in (SchedulingPolicy.STATIC, SchedulingPolicy.FCFS)
    )
    most = bound(requests, slots)
    show(
        f"Simulated, equal slots: {slots} (gain at most {most:.2f}: longest over mean output of a batch)",
        {"static": static, "continuous": continuous},
        static,
    )
    return {
        "slots": slots,
        "static": asdict(static),
        "continuous": asdict(continuous),
        "gain": continuous.output_tokens_per_s / static.output_tokens_per_s,
        "bound": most,
    }


def equal_memory(requests: Sequence[Lengths], name: str) -> dict[str, Any]:
    """The KV cache of the published A10G: who reserves contexts has few slots, who takes pages has many."""
    slots = A10G.num_kv_tokens // CONTEXT
    static = simulate(SchedulingPolicy.STATIC, requests, with_room_for(slots), slots)
    reserved = simulate(SchedulingPolicy.FCFS, requests, with_room_for(slots), slots)
    paged = simulate(SchedulingPolicy.FCFS, requests, A10G, A10G.max_num_seqs)
    outcomes = {
        "static, context reserved": static,
        "continuous, context reserved": reserved,
        "continuous, paged": paged,
    }
    title = f"Simulated, equal memory: {A10G.num_kv_tokens:,} tokens or {slots} contexts of {CONTEXT:,}; {name}"
    show(title, outcomes, static)
    return {
        "slots": slots,
        **{name: asdict(found) for name, found in zip(("static", "reserved", "paged"), outcomes.values(), strict=True)},
        "gain": paged.output_tokens_per_s / static.output_tokens_per_s,
        "scheduling": reserved.output_tokens_per_s / static.output_tokens_per_s,
        "paging": paged.output_tokens_per_s / reserved.output_tokens_per_s,
        "scheduling_bound": bound(requests, slots),
    }


def show(title: str, outcomes: dict[str, Outcome], static: Outcome) -> None:
    rows = [
        [
            name,
            f"{outcome.output_tokens_per_s:.1f}",
            f"{outcome.running:.1f}",
            f"{outcome.output_tokens_per_s / static.output_tokens_per_s:.2f}",
        ]
        for name, outcome in outcomes.items()
    ]
    common.print_table(title, ["batching", "output tokens/s", "requests in a step", "over static"], rows)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--simulated", action="store_true", help="leave the real model out")
    options = parser.parse_args()
    requests = [pair for pair in lengths(options.seed) if sum(pair) <= CONTEXT]
    requests = requests[: (4 if options.quick else BATCHES) * NUM_SLOTS]
    results = {} if options.simulated else real_model(5.0 if options.quick else 60.0, options.seed)
    results["simulated_equal_slots"] = equal_slots(requests, NUM_SLOTS)
    results["simulated_equal_memory"] = equal_memory(requests, "ShareGPT, with the turns before")
    first_turns = [(r.num_prompt_tokens, r.num_output_tokens) for r in load_trace(common.DATA / "arena_trace.csv")]
    first_turns = first_turns[: len(requests)]
    results["simulated_equal_memory_first_turns"] = equal_memory(first_turns, "Chatbot Arena, first turns")
    common.finish("static", results)


if __name__ == "__main__":
    main()
