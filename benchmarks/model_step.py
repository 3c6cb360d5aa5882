"""Time of one step of the default model by its number of tokens, and which operations take it.

A step is timed as it is served, and by turns with its operations called one by one, which tells their shares.
Two kinds of steps: decodes (one token each of as many requests) and one chunk of a prompt. The floor of a step is what
its arithmetic, or reading its weights, keys and values takes at the best rates that this machine shows in one product
of large matrices and in one of a vector with a large matrix, whichever is more. A third table times the sampler.
"""

import statistics
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import common
import msgspec
import torch
from step_floor import Floor
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.model_runner import ModelRunner
from evenhand_engine.core.sampler import SamplingRow, sample
from evenhand_engine.core.structures import Structures
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import ModelConfig, load_model_config
from evenhand_engine.model.decoder import build_decoder
from evenhand_engine.model.precision import (
    ACTIVATION_DTYPES,
    DTYPES,
    QUANTIZATIONS,
    Precision,
    resolve_activation_dtype,
    resolve_kv_cache_dtype,
    resolve_precision,
)
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.model.weights import checkpoint_bytes, load_weights
from evenhand_engine.scheduler.batch import Batch, BatchPlan
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.kernels import (
    Attention,
    AttentionBatch,
    AttentionLayer,
    AttentionPlan,
    Draw,
    Embedding,
    Kernels,
    KvCacheShape,
    Linear,
    LogProbabilities,
)
from evenhand_kernels.quantized import Weight
from evenhand_kernels.reference import ReferenceKernels

DECODE_CONTEXT, CHUNK_CONTEXT = 250, 1000
SIZES = (1, 4, 16, 32, 48, 64, 128, 256, 512)
MAX_DECODES = 64
OPERATIONS = ("linear", "gated_linear", "attention", "norm")
SAMPLED_ROWS = (1, 16, 64)
SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
)


class TimedKernels:
    """Kernels that add up the seconds spent in each kind of operation."""

    def __init__(self, kernels: Kernels) -> None:
        self.untimed = kernels
        self.name = kernels.name
        self.torch_device = kernels.torch_device
        self.seconds: dict[str, float] = defaultdict(float)

    def linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        return self._timed("linear", self.untimed.linear(weight, bias))

    def embedding(self, weight: Weight) -> Embedding:
        return self.untimed.embedding(weight)

    def tied_embedding(self, weight: Weight) -> tuple[Embedding, Linear]:
        embedding, linear = self.untimed.tied_embedding(weight)
        return embedding, self._timed("linear", linear)

    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        return self._timed("gated_linear", self.untimed.gated_linear(weight, bias))

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        return self.untimed.plan(batch)

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> Attention:
        return self._timed("attention", self.untimed.attention(layer, cache))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._timed("norm", self.untimed.rms_norm)(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._timed("norm", self.untimed.add_rms_norm)(x, residual, weight, eps)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        return self.untimed.draw(logits, draws)

    def log_probabilities(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
        return self.untimed.log_probabilities(logits, token_ids, num_top)

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
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--kv-cache-dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--activation-dtype", choices=("auto", *ACTIVATION_DTYPES), default="auto")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    options = parser.parse_args()
    seconds = 0.3 if options.quick else 3.0
    model_dir = resolve_model_dir(None)
    config = load_model_config(model_dir)
    precision = resolve_precision(options.dtype, options.quantization)
    activation_dtype = resolve_activation_dtype(options.activation_dtype)
    kernels = TimedKernels(
        CpuKernels(cache_dir() / "kernels", options.threads, activation_dtype)
        if options.kernels == "cpu"
        else ReferenceKernels()
    )
    torch.set_num_threads(1 if options.kernels == "cpu" else options.threads)
    kv_dtype = resolve_kv_cache_dtype(options.kv_cache_dtype, options.dtype, config)
    weight_bytes = precision.dtype.itemsize if precision.dtype else checkpoint_bytes(model_dir) / config.num_parameters
    floor = Floor.measured(kernels, config, weight_bytes, kv_dtype.itemsize)
    runners = [_runner(each, config, precision, kv_dtype) for each in (kernels.untimed, kernels)]
    decodes = {
        size: _measure(runners, kernels, floor, _decodes(size), seconds)
        for size in options.sizes
        if size <= MAX_DECODES
    }
    chunks = {size: _measure(runners, kernels, floor, _chunk(size), seconds) for size in options.sizes}
    sampling = {
        rows: [_sampling_ms(kernels, rows, config.vocab_size, params) for params in SAMPLING] for rows in SAMPLED_ROWS
    }
    common.console.print(f"best rates: {floor.flops / 1e9:.0f} GFLOP/s, {floor.bandwidth / 1e9:.1f} GB/s")
    _print(f"decodes, {DECODE_CONTEXT} tokens of context each", decodes)
    _print(f"one chunk of a prompt behind {CHUNK_CONTEXT} tokens", chunks)
    common.print_table(
        "sampling, ms",
        ["rows", *(" ".join(f"{name} {value}" for name, value in params.items()) for params in SAMPLING)],
        [[str(rows), *(f"{milliseconds:.1f}" for milliseconds in row)] for rows, row in sampling.items()],
    )
    common.finish(
        "model_step",
        {
            "decode_ms": {size: row["step"] for size, row in decodes.items()},
            "chunk_ms": {size: row["step"] for size, row in chunks.items()},
            "decode_floor_ms": {size: row["floor"] for size, row in decodes.items()},
            "chunk_floor_ms": {size: row["floor"] for size, row in chunks.items()},
            "sampling_ms": sampling,
        },
    )


def _runner(kernels: Kernels, config: ModelConfig, precision: Precision, kv_dtype: torch.dtype) -> ModelRunner:
    num_blocks = MAX_DECODES * (DECODE_CONTEXT // 16 + 1) + (CHUNK_CONTEXT + max(SIZES)) // 16 + 1
    settings = SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=max(SIZES), num_kv_blocks=num_blocks)
    cache = KvCacheShape(num_blocks, settings.block_size, kv_dtype)
    weights = load_weights(resolve_model_dir(None), config, precision, kernels)
    return ModelRunner(
        build_decoder(config, weights, kernels, cache, settings.max_model_len), settings, Structures(config.vocab_size)
    )


def _request(seat: int, num_computed: int, num_scheduled: int, first_block: int) -> Request:
    num_tokens = num_computed + num_scheduled
    prompt = [(7 * position) % 40000 + 100 for position in range(num_tokens)]
    request = Request(f"r{seat}", "t", prompt, SamplingParams(max_tokens=9, temperature=0), 0.0)
    request.seat, request.num_computed_tokens = seat, num_computed
    request.block_table = list(range(first_block, first_block + num_tokens // 16 + 1))
    return request


def _decodes(size: int) -> Batch:
    plan, per_request = BatchPlan(), DECODE_CONTEXT // 16 + 1
    for seat in range(size):  # as chunks of one token, by which the runner hears of the requests too
        plan.add_chunk(_request(seat, DECODE_CONTEXT - 1, 1, seat * per_request), 1)
    return msgspec.structs.replace(plan.build(0, ()), num_decodes=size)


def _chunk(size: int) -> Batch:
    plan = BatchPlan()
    plan.add_chunk(_request(0, CHUNK_CONTEXT, size, MAX_DECODES * (DECODE_CONTEXT // 16 + 1)), size)
    return plan.build(0, ())


def _sampling_ms(kernels: Kernels, num_rows: int, vocab_size: int, params: dict[str, Any]) -> float:
    """Of the fastest of several calls. The logits are as spread as those of a model that is sure of little."""
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    rows = [SamplingRow(SamplingParams(max_tokens=9, seed=number, **params), 0) for number in range(num_rows)]
    return 1e3 * min(timeit.repeat(lambda: sample(logits, rows, kernels), number=1, repeat=7))


def _measure(
    runners: Sequence[ModelRunner], kernels: TimedKernels, floor: Floor, batch: Batch, seconds: float
) -> dict[str, float]:
    """Medians in ms: of the whole step, and of each kind of operation where they are called one by one.

    The first runner computes the step as it is served, the second one with the timed kernels; they take turns.
    """
    samples: list[dict[str, float]] = []
    started_at = time.perf_counter()
    while len(samples) < 4 or time.perf_counter() - started_at < seconds:
        kernels.seconds.clear()
        step, one_by_one = [timeit.timeit(lambda: _step(runner, batch), number=1) for runner in runners]  # noqa: B023
        samples.append({"step": step, "one_by_one": one_by_one} | kernels.seconds)
    samples = samples[1:]
    names = ("step", "one_by_one", *OPERATIONS)
    row = {name: 1e3 * statistics.median(sample[name] for sample in samples) for name in names}
    row["least"] = 1e3 * min(sample["step"] for sample in samples)
    row["floor"] = floor.milliseconds(batch.scheduled)
    row["tokens_per_s"] = 1e3 * batch.num_tokens / row["step"]
    return row


def _step(runner: ModelRunner, batch: Batch) -> None:
    runner.submit(batch)
    runner.collect()


def _print(title: str, rows: dict[int, dict[str, float]]) -> None:
    best = max(row["tokens_per_s"] for row in rows.values())
    headings = [
        "tokens",
        "step ms",
        "least ms",
        "floor ms",
        "tokens/s",
        "of best",
        *OPERATIONS,
        "rest",
    ]
    common.print_table(
        title,
        headings,
        [
            [
                str(size),
                f"{row['step']:.1f}",
                f"{row['least']:.1f}",
                f"{row['floor']:.1f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['tokens_per_s'] / best:.0%}",
                *(f"{row[name]:.1f}" for name in OPERATIONS),
                f"{row['one_by_one'] - sum(row[name] for name in OPERATIONS):.1f}",
            ]
            for size, row in rows.items()
        ],
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
