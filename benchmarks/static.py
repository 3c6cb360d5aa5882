"""Continuous against static batching on the real model, with lengths of ShareGPT conversations.

A closed loop keeps twice as many requests in the engine as there are batch slots. Static batching runs a batch to the
end of its longest request before the next one starts; continuous batching refills a slot in the step after it falls
free. Lengths are ShareGPT's divided by 16, so that a run takes minutes on a CPU; their spread, which is what matters,
stays. On a CPU a step's cost grows with its batch, so less is gained than on a GPU, where idle slots cost as much as
busy ones.
"""

import csv
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import common

from evenhand_engine.config import EngineConfig, SchedulingPolicy
from evenhand_engine.model_runner import load_model
from evenhand_engine.request import Request, SamplingParams
from evenhand_engine.scheduler import Scheduler
from evenhand_policy.config import SchedulerConfig

NUM_SLOTS = 16
SHRINK = 16


@dataclass
class Run:
    """Outputs of one run; `slot_utilisation` is the mean share of slots with work in a step."""

    output_tokens_per_s: float
    slot_utilisation: float


def lengths(seed: int) -> list[tuple[int, int]]:
    """(prompt, output) lengths of ShareGPT in random order, shrunk."""
    with (common.DATA / "sharegpt_lengths.csv").open(encoding="utf-8") as file:
        rows = [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
    random.Random(seed).shuffle(rows)
    return [(max(1, prompt // SHRINK), max(1, output // SHRINK)) for prompt, output in rows]


def run(policy: SchedulingPolicy, seconds: float, seed: int) -> Run:
    """Serve the closed loop for some seconds, then until the batch under way has ended."""
    config = EngineConfig(scheduling_policy=policy, max_num_seqs=NUM_SLOTS, enable_prefix_caching=False)
    model = load_model(config)
    scheduler = Scheduler(model.settings, SchedulerConfig())
    pending, rng = iter(lengths(seed)), random.Random(seed)
    num_added = num_outputs = num_steps = num_busy = 0
    started_at = time.monotonic()
    while (now := time.monotonic()) < started_at + seconds or (
        policy is SchedulingPolicy.STATIC and scheduler.roster.num_running > 0
    ):
        while len(scheduler.roster.requests) < 2 * NUM_SLOTS:
            num_prompt_tokens, num_output_tokens = next(pending)
            prompt = [rng.randrange(1000, 40000) for _ in range(num_prompt_tokens)]
            params = SamplingParams(max_tokens=num_output_tokens, temperature=0)
            scheduler.add(Request(f"r{num_added}", "default", prompt, params, now), now)
            num_added += 1
        batch = scheduler.step(now)
        assert batch is not None
        model.runner.submit(batch)
        outputs = scheduler.update(batch, model.runner.collect(), time.monotonic())
        num_outputs += sum(len(output.token_ids) for output in outputs)
        num_busy += len(batch.scheduled)
        num_steps += 1
    elapsed = time.monotonic() - started_at
    return Run(num_outputs / elapsed, num_busy / (num_steps * NUM_SLOTS))


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    seconds = 5.0 if options.quick else 60.0
    # A process for each, as for a server: what the first run leaves behind (threads, caches) must not touch the second.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as process:
        runs = {
            policy: process.submit(run, policy, seconds, options.seed).result()
            for policy in (SchedulingPolicy.STATIC, SchedulingPolicy.FCFS)
        }
    static, continuous = runs[SchedulingPolicy.STATIC], runs[SchedulingPolicy.FCFS]
    rows = [
        [name, f"{outcome.output_tokens_per_s:.1f}", f"{outcome.slot_utilisation:.0%}"]
        for name, outcome in (("static", static), ("continuous", continuous))
    ]
    common.print_table("ShareGPT lengths / 16, 16 slots", ["batching", "output tokens/s", "slots with work"], rows)
    common.finish(
        "static",
        {
            "continuous_over_static": continuous.output_tokens_per_s / static.output_tokens_per_s,
            "slot_utilisation": {"static": static.slot_utilisation, "continuous": continuous.slot_utilisation},
        },
    )


if __name__ == "__main__":
    main()
