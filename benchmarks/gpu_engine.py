"""The engine from end to end on shapes of 1B and 8B with random weights: its decode steps against what memory allows, how
idle the GPU is meanwhile, and its throughput against transformers' continuous batching on the same requests.

The floor of a step is the bytes of the weights and of the keys and values that it reads over the copy rate measured in the
same run. Idle is the part of the decode steps' time in which no kernel ran, by torch's profiler. Throughput is that of 256
requests with the lengths of ShareGPT conversations, all there at once; transformers is stopped after a while, and what it
has finished by then counts.
"""

import csv
import gc
import random
import statistics
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import common
import torch
from gpu_common import LLAMA, SHAPES, Loop, Options, copy_rate, load, options, report
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from evenhand_engine.core.loading import LoadedModel
from evenhand_engine.scheduler.request import FinishReason
from evenhand_kernels.device import Device

NUM_REQUESTS, LONGEST, LONGEST_OUTPUT = 256, 4096, 256
BASELINE_SECONDS = 60.0
CONTEXT, WARM_STEPS, TIMED_STEPS, TRACED_STEPS = 512, 8, 40, 20

Lengths = list[tuple[int, int]]


def lengths(options: Options) -> Lengths:
    """Prompt and output tokens; the longest conversations are left out, and outputs are cut."""
    with (common.DATA / "sharegpt_lengths.csv").open(encoding="utf-8") as file:
        rows = [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]
    random.Random(options.seed).shuffle(rows)
    if options.is_tiny:
        return [(max(1, prompt % 20), max(1, output % 4)) for prompt, output in rows[:3]]
    kept = [(prompt, min(output, LONGEST_OUTPUT)) for prompt, output in rows if prompt + output <= LONGEST]
    return kept[:NUM_REQUESTS]


def decode_steps(options: Options, model: LoadedModel, shape: str, name: str, rate: float) -> None:
    """Steps of as many decodes as the engine takes at once; told before the profiler runs, and with what it finds."""
    number, context = (2, 12) if options.is_tiny else (NUM_REQUESTS, CONTEXT)
    warm, timed, traced = (1, 2, 1) if options.is_tiny else (WARM_STEPS, TIMED_STEPS, TRACED_STEPS)
    loop = Loop(model, model.settings, seed=options.seed)
    for _ in range(number):
        loop.add(context, warm + timed + traced + 64)
    while any(not timing.token_times for timing in loop.timings.values()):
        loop.step()
    for _ in range(warm):
        loop.step()
    ends = []
    for _ in range(timed):
        loop.step()
        ends.append(loop.now)
    step = statistics.median(b - a for a, b in pairwise(ends))
    num_tokens = sum(request.num_tokens for request in loop.scheduler.request_table.requests.values())
    floor = (weight_bytes(shape) + num_tokens * kv_bytes(shape)) / rate
    found = {"requests": number, "step_ms": 1e3 * step, "floor_ms": 1e3 * floor, "over_floor": step / floor}
    report(**{name: found})
    report(**{name: found | {"idle": None if options.is_tiny else traced_idle(loop, traced)}})
    for request_id in list(loop.timings):
        loop.scheduler.abort(request_id, FinishReason.ABORT)
    loop.drain()


def weight_bytes(shape: str) -> int:
    """Read in each step: all but the embedding's table, of which a step reads some rows, where the head has its own."""
    c = SHAPES[shape]
    heads = (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * c["head_dim"]
    layer = c["hidden_size"] * (heads + 3 * c["intermediate_size"])
    return 2 * int(c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"])


def kv_bytes(shape: str) -> int:
    """Of one token."""
    c = SHAPES[shape]
    return 2 * 2 * int(c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"])


def traced_idle(loop: Loop, num_steps: int) -> float | None:
    """The part of some steps' time in which nothing ran on the GPU; None where the profiler sees nothing of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(num_steps):
            loop.step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end) for event in profile.events() if event.device_type.name == "CUDA"
    ]
    return idle_part(spans) if spans else None


def idle_part(spans: Iterable[tuple[float, float]]) -> float:
    """Of the time from the first begin to the last end, what no span covers."""
    spans = sorted(spans)
    busy, end = 0.0, spans[0][0]
    for begin, until in spans:
        busy += max(0.0, until - max(begin, end))
        end = max(end, until)
    return 1 - busy / (end - spans[0][0])


def throughput(model: LoadedModel, requests: Lengths, seed: int) -> float:
    """Output tokens a second, from the first request's arrival to the last one's end."""
    loop = Loop(model, model.settings, seed=seed)
    for prompt, output in requests:
        loop.add(prompt, output)
    loop.drain()
    return loop.num_outputs() / loop.now


def baseline(options: Options, device: Device, shape: str, requests: Lengths) -> dict[str, Any]:
    """transformers' continuous batching of the same requests, until it is done or its time is up."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(**{key: value for key, value in (LLAMA | SHAPES[shape]).items() if key != "architectures"})
    with torch.device(device.torch_device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    rng = random.Random(options.seed)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=LONGEST_OUTPUT)
    num_outputs = finished = 0
    # of a GPU it takes what is free; of a machine without one it would take nine tenths, and use them
    cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=256) if options.is_tiny else None
    with model.continuous_batching_context_manager(generation, timeout=5, continuous_batching_config=cache) as manager:
        started_at = time.perf_counter()
        for prompt, output in requests:
            manager.add_request([rng.randrange(2, 190) for _ in range(prompt)], max_new_tokens=output)
        while finished < len(requests) and time.perf_counter() - started_at < BASELINE_SECONDS:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(f"transformers failed a request: {result.error}")
                finished += 1
                num_outputs += len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended by itself")
        seconds = time.perf_counter() - started_at
    return {"output_tokens_per_s": num_outputs / seconds, "finished": finished}


def main() -> None:
    chosen = options(__doc__, shape=("1b", "8b"))
    opts: Options = chosen.options
    shape = "tiny" if opts.is_tiny else chosen.shape
    device = opts.make_device()
    with device.stream():
        rate = copy_rate(device, 1 << 16 if opts.is_tiny else 4 << 30)
    requests = lengths(opts)
    settings: dict[str, Any] = {"max_num_seqs": 2, "kv_cache_bytes": 1 << 20} if opts.is_tiny else {"max_num_seqs": 256}
    started_at = time.perf_counter()
    model = load(opts, shape, enable_prefix_caching=False, gpu_memory_utilization=0.7, **settings)
    report(**{f"start_{chosen.shape}_s": time.perf_counter() - started_at})
    decode_steps(opts, model, shape, f"decode_step_{chosen.shape}", rate)
    ours = throughput(model, requests, opts.seed)
    report(**{f"throughput_{chosen.shape}": {"output_tokens_per_s": ours, "requests": len(requests)}})
    del model
    gc.collect()
    if not opts.is_tiny:
        torch.cuda.empty_cache()
    theirs = baseline(opts, device, shape, requests)
    report(**{f"transformers_{chosen.shape}": theirs | {"ours_over_theirs": ours / theirs["output_tokens_per_s"]}})


if __name__ == "__main__":
    main()
