"""The incident on a GPU, in the 8B shape: a chat tenant beside another's flood of long prompts, a very long prompt beside
streams, and continuous against static batching in the same memory.

The engine's own loop without HTTP: a time to first token runs from a request's arrival at the scheduler to its token on the
host. Chats come in an open loop, 32 a second, prompts of 200 tokens with 32 output tokens; the flood keeps 64 prompts of
8,000 tokens with 16 output tokens each in flight. fcfs gets the token budgets that fair used, step by step, so that both do
equal work: see incident.py.
"""

import csv
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import common
import numpy as np
from gpu_common import Loop, Options, load, options, report

from evenhand_engine.config import SchedulingPolicy
from evenhand_engine.core.loading import LoadedModel
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import LatencyClass, SchedulerConfig, Slo, TenantConfig

TENANTS = SchedulerConfig(
    tenants=(
        TenantConfig(tenant_id="batch", weight=1, latency_class=LatencyClass.BATCH),
        TenantConfig(
            tenant_id="chat",
            weight=4,
            latency_class=LatencyClass.INTERACTIVE,
            slo=Slo(time_to_first_token_ms=500, inter_token_latency_ms=100),
        ),
    )
)
SETTLE_SECONDS, SECONDS = 5.0, 20.0
CHATS_PER_SECOND, FLOOD = 32.0, 64
CHAT, BATCH = (200, 32), (8000, 16)
LONG, STREAMS = 28_000, 20
CONTEXT, STATIC_SLOTS = 4096, 16


def run(
    options: Options, model: LoadedModel, policy: SchedulingPolicy, token_budgets: Iterator[int] | None = None
) -> tuple[dict[str, float], list[int]]:
    """Both tenants for some seconds; what chat saw and how fast batch was, and the tokens of each step."""
    settle, seconds, per_second, flood, chat, batch = SETTLE_SECONDS, SECONDS, CHATS_PER_SECOND, FLOOD, CHAT, BATCH
    if options.is_tiny:
        settle, seconds, per_second, flood, chat, batch = 0.0, 2.0, 4.0, 1, (5, 2), (30, 2)
    settings = replace(model.settings, scheduling_policy=policy)
    loop = Loop(model, settings, TENANTS, token_budgets, options.seed)
    running: list[Any] = []
    next_chat = 0.0
    while (now := loop.now) < settle + seconds:
        while next_chat <= now:
            loop.add(*chat, "chat")
            next_chat += 1 / per_second
        running = [timing for timing in running if len(timing.token_times) < batch[1]]
        running += [loop.add(*batch, "batch") for _ in range(flood - len(running))]
        loop.step()
    measured = [t for t in loop.timings.values() if t.tenant_id == "chat" and t.sent_at >= settle]
    first = [(t.token_times[0] if t.token_times else now) - t.sent_at for t in measured]
    gaps = [b - a for t in measured for a, b in itertools.pairwise(t.token_times)]
    found = {
        "chat_ttft_p50_s": float(np.percentile(first, 50)),
        "chat_ttft_p95_s": float(np.percentile(first, 95)),
        "chat_itl_p99_s": float(np.percentile(gaps, 99)) if gaps else float("nan"),
        "batch_tokens_per_s": batch_tokens(loop, batch, settle, now) / (now - settle),
    }
    steps = list(loop.num_tokens_of_steps)
    stop(loop)
    return found, steps


def batch_tokens(loop: Loop, batch: tuple[int, int], since: float, until: float) -> float:
    """Computed for the flood: a prompt counts when its first token comes."""
    prompt, _ = batch
    times = [t.token_times for t in loop.timings.values() if t.tenant_id == "batch"]
    return sum(prompt * (since <= each[0] <= until) for each in times if each) + loop.num_outputs("batch", since)


def stop(loop: Loop) -> None:
    for name in list(loop.scheduler.request_table.requests):
        loop.scheduler.abort(name, FinishReason.ABORT)
    loop.drain()


def incident(options: Options, model: LoadedModel) -> None:
    fair, steps = run(options, model, SchedulingPolicy.FAIR)
    report(incident_fair=fair)
    fcfs, _ = run(options, model, SchedulingPolicy.FCFS, itertools.cycle(steps))
    report(incident_fcfs=fcfs, batch_fair_over_fcfs=fair["batch_tokens_per_s"] / fcfs["batch_tokens_per_s"])


def long_prompt(options: Options, model: LoadedModel) -> None:
    """The longest gap of streams while a very long prompt is computed beside them."""
    length, streams = (40, 2) if options.is_tiny else (LONG, STREAMS)
    loop = Loop(model, model.settings, TENANTS, seed=options.seed)
    timings = [loop.add(5 if options.is_tiny else 200, 20 if options.is_tiny else 2000, "chat") for _ in range(streams)]
    while any(not timing.token_times for timing in timings):
        loop.step()
    long = loop.add(length, 1, "batch")
    while not long.token_times:
        loop.step()
    gaps = [b - a for t in timings for a, b in itertools.pairwise(t.token_times) if b >= long.sent_at]
    report(long_prompt={"longest_gap_s": max(gaps), "seconds": long.token_times[0] - long.sent_at})
    stop(loop)


def batching(options: Options, model: LoadedModel) -> None:
    """ShareGPT lengths in the memory of some whole contexts: static reserves one for each of its few slots."""
    number, context, slots, shrink = (3, 40, 1, 100) if options.is_tiny else (192, CONTEXT, STATIC_SLOTS, 2)
    with (common.DATA / "sharegpt_lengths.csv").open(encoding="utf-8") as file:
        rows = [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
    random.Random(options.seed).shuffle(rows)
    requests = [(max(1, a // shrink), max(1, b // shrink)) for a, b in rows if a // shrink + b // shrink < context - 2]
    num_blocks = slots * context // model.settings.block_size
    rates = {}
    for policy in (SchedulingPolicy.STATIC, SchedulingPolicy.FCFS):
        static = policy is SchedulingPolicy.STATIC
        settings = replace(
            model.settings,
            scheduling_policy=policy,
            num_kv_blocks=min(num_blocks, model.settings.num_kv_blocks),
            max_model_len=min(context, model.settings.max_model_len),
            max_num_seqs=slots if static else model.settings.max_num_seqs,
        )
        loop = Loop(model, settings, seed=options.seed)
        for prompt, output in requests[:number]:
            loop.add(prompt, output)
        loop.drain()
        rates[policy.value] = loop.num_outputs() / loop.now
    report(batching=rates | {"continuous_over_static": rates["fcfs"] / rates["static"]})


def main() -> None:
    chosen = options(__doc__, shape=("8b", "1b"))
    opts: Options = chosen.options
    tiny: dict[str, Any] = {"max_num_seqs": 3, "kv_cache_bytes": 1 << 20, "max_num_batched_tokens": 16}
    model = load(
        opts, "tiny" if opts.is_tiny else chosen.shape, enable_prefix_caching=False, **(tiny if opts.is_tiny else {})
    )
    long_prompt(opts, model)
    incident(opts, model)
    batching(opts, model)


if __name__ == "__main__":
    main()
