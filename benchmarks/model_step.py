"""Time of one step of the default model by its number of tokens, and which operations take it.

Two kinds of steps: decodes (one token each of as many requests) and one chunk of a prompt. The floor of a step is what
its arithmetic or its weights need on this machine, whichever is more.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import common
import torch
from torch import Tensor

from evenhand_engine.batch import Batch, ScheduledRequest
from evenhand_engine.config import SchedulerSettings
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.decoder import build_decoder
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.model.weights import load_weights
from evenhand_engine.model_runner import DTYPES, ModelRunner
from evenhand_engine.request import Request, SamplingParams
from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.kernels import Attention, AttentionLayer, Kernels, KvCacheShape, Linear
from evenhand_kernels.reference import ReferenceKernels

DECODE_CONTEXT, CHUNK_CONTEXT = 250, 1000
SIZES = (1, 4, 16, 32, 48, 64, 128, 256, 512)
MAX_DECODES = 64
OPERATIONS = ("linear", "gated_linear", "attention", "norm")


class TimedKernels:
    """Kernels that add up the seconds spent in each kind of operation."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.name = kernels.name
        self.seconds: dict[str, float] = defaultdict(float)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._timed("linear", self._kernels.linear(weight, bias))

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._timed("gated_linear", self._kernels.gated_linear(weight, bias))

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> Attention:
        return self._timed("attention", self._kernels.attention(layer, cache))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._timed("norm", self._kernels.rms_norm)(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._timed("norm", self._kernels.add_rms_norm)(x, residual, weight, eps)

    def _timed(self, name: str, operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: object) -> Tensor:
            started_at = time.perf_counter()
            result = operation(*args)
            self.seconds[name] += time.perf_counter() - started_at
            return result

        return timed


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--kernels", choices=("cpu", "torch"), default="cpu")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    options = parser.parse_args()
    seconds = 0.3 if options.quick else 3.0
    kernels = TimedKernels(
        CpuKernels(cache_dir() / "kernels", options.threads) if options.kernels == "cpu" else ReferenceKernels()
    )
    torch.set_num_threads(1 if options.kernels == "cpu" else options.threads)
    runner = _runner(kernels, options.dtype)
    decodes = {
        size: _measure(runner, kernels, _decodes(size), seconds) for size in options.sizes if size <= MAX_DECODES
    }
    chunks = {size: _measure(runner, kernels, _chunk(size), seconds) for size in options.sizes}
    _print(f"decodes, {DECODE_CONTEXT} tokens of context each", decodes)
    _print(f"one chunk of a prompt behind {CHUNK_CONTEXT} tokens", chunks)
    common.finish(
        "model_step",
        {
            "decode_ms": {size: row["step"] for size, row in decodes.items()},
            "chunk_ms": {size: row["step"] for size, row in chunks.items()},
        },
    )


def _runner(kernels: Kernels, dtype_name: str) -> ModelRunner:
    model_dir, dtype = resolve_model_dir(None), DTYPES[dtype_name]
    config = load_model_config(model_dir)
    num_blocks = MAX_DECODES * (DECODE_CONTEXT // 16 + 1) + (CHUNK_CONTEXT + max(SIZES)) // 16 + 1
    settings = SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=max(SIZES), num_kv_blocks=num_blocks)
    cache = KvCacheShape(num_blocks, settings.block_size, dtype)
    weights = load_weights(model_dir, config, dtype, kernels)
    return ModelRunner(build_decoder(config, weights, kernels, cache, settings.max_model_len), settings)


def _item(number: int, num_computed: int, num_scheduled: int, first_block: int) -> ScheduledRequest:
    num_tokens = num_computed + num_scheduled
    prompt = [(7 * position) % 40000 + 100 for position in range(num_tokens)]
    request = Request(f"r{number}", "t", prompt, SamplingParams(max_tokens=9, temperature=0), 0.0)
    request.block_table = list(range(first_block, first_block + num_tokens // 16 + 1))
    return ScheduledRequest(request, num_computed, num_scheduled, samples=True)


def _decodes(size: int) -> tuple[ScheduledRequest, ...]:
    per_request = DECODE_CONTEXT // 16 + 1
    return tuple(_item(number, DECODE_CONTEXT - 1, 1, number * per_request) for number in range(size))


def _chunk(size: int) -> tuple[ScheduledRequest, ...]:
    return (_item(0, CHUNK_CONTEXT, size, MAX_DECODES * (DECODE_CONTEXT // 16 + 1)),)


def _measure(
    runner: ModelRunner, kernels: TimedKernels, items: tuple[ScheduledRequest, ...], seconds: float
) -> dict[str, float]:
    """Medians in ms: of the whole step, and of each kind of operation in it."""
    samples: list[dict[str, float]] = []
    started_at = time.perf_counter()
    while len(samples) < 4 or time.perf_counter() - started_at < seconds:
        kernels.seconds.clear()
        step_at = time.perf_counter()
        runner.submit(Batch(0, items))
        runner.collect()
        samples.append({"step": time.perf_counter() - step_at} | kernels.seconds)
    samples = samples[1:]
    row = {name: 1e3 * statistics.median(sample[name] for sample in samples) for name in ("step", *OPERATIONS)}
    row["least"] = 1e3 * min(sample["step"] for sample in samples)
    row["tokens_per_s"] = 1e3 * sum(item.num_scheduled_tokens for item in items) / row["step"]
    return row


def _print(title: str, rows: dict[int, dict[str, float]]) -> None:
    best = max(row["tokens_per_s"] for row in rows.values())
    headings = [
        "tokens",
        "step ms",
        "least ms",
        "tokens/s",
        "of best",
        *(f"{name} ms" for name in OPERATIONS),
        "rest ms",
    ]
    common.print_table(
        title,
        headings,
        [
            [
                str(size),
                f"{row['step']:.1f}",
                f"{row['least']:.1f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['tokens_per_s'] / best:.0%}",
                *(f"{row[name]:.1f}" for name in OPERATIONS),
                f"{row['step'] - sum(row[name] for name in OPERATIONS):.1f}",
            ]
            for size, row in rows.items()
        ],
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
