"""ModelRunner: computes batches with a model on one device; `load_model` makes one from the engine's settings."""

import logging
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from evenhand_engine.config import EngineConfig, SchedulerSettings
from evenhand_engine.core.sampler import Seats, accept, sample
from evenhand_engine.core.staging import Staging
from evenhand_engine.errors import StartupError
from evenhand_engine.model import default_model
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import ModelConfig, load_model_config
from evenhand_engine.model.decoder import Decoder, build_decoder, forward
from evenhand_engine.model.memory import require_memory
from evenhand_engine.model.precision import DTYPES, Precision, resolve_kv_cache_dtype, resolve_precision
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.model.weights import RandomTensors, Weights, assemble, checkpoint_bytes, load_weights
from evenhand_engine.scheduler.batch import Batch, BatchPlan, Runner
from evenhand_engine.scheduler.request import Request, Sampled, SamplingParams
from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.cpu.library import CompileError
from evenhand_kernels.kernels import Kernels, KvCacheShape
from evenhand_kernels.reference import ReferenceKernels

logger = logging.getLogger(__name__)

DEFAULT_KV_CACHE_BYTES = 1 << 30
DEFAULT_MAX_NUM_SEQS = 32
DEFAULT_MAX_NUM_BATCHED_TOKENS = 256


class ModelRunner:
    """Implements `Runner` on the CPU: `submit` computes, `collect` returns what it sampled.

    Its own state is the content of the KV cache, and by seat the tokens and block table of who runs.
    """

    def __init__(self, decoder: Decoder, settings: SchedulerSettings) -> None:
        self._decoder = decoder
        self._staging = Staging(settings, decoder.kernels)
        self._seats = Seats()
        self._results: deque[list[Sampled]] = deque()

    @property
    def pipeline_depth(self) -> int:
        return 1

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        model_input = self._staging.fill(batch)
        rows = self._seats.prepare(batch)
        logits = forward(self._decoder, model_input)
        results = accept(batch, sample(logits, rows, self._decoder.kernels))
        for item, result in zip((item for item in batch.scheduled if item.num_samples), results, strict=True):
            first = item.num_computed_tokens + item.num_scheduled_tokens - item.num_samples + 1
            self._staging.append(item.seat, first, result.token_ids)
        self._results.append(results)

    def collect(self) -> list[Sampled]:
        return self._results.popleft()

    def warm_up(self, settings: SchedulerSettings) -> None:
        """Run a full step and a decode, so that no user waits for what happens at first use."""
        num_tokens = min(settings.max_num_batched_tokens, settings.max_model_len - 1)
        request = Request("", "", [0] * num_tokens, SamplingParams(max_tokens=2, temperature=0), arrival_time=0.0)
        request.seat = 0
        request.block_table = list(range(num_tokens // settings.block_size + 1))
        for step_id in range(2):
            plan = BatchPlan()
            plan.add_chunk(request, request.num_pending_tokens)
            self.submit(plan.build(step_id, ()))
            self.collect()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to compute. `settings` has every default resolved."""

    runner: Runner
    settings: SchedulerSettings
    model_name: str
    dtype: str
    device: str


def load_model(config: EngineConfig) -> LoadedModel:
    """Load the model, allocate the KV cache and run once. Raises StartupError, before it loads where it can."""
    model_dir = resolve_model_dir(config.model)
    model_config = load_model_config(model_dir)
    precision = resolve_precision(config.dtype, config.quantization)
    kv_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, config.dtype, model_config)
    settings = _resolve_settings(config, model_config, kv_dtype)
    require_memory(
        weights=_weight_bytes(config, model_dir, model_config, precision),
        kv_cache=settings.num_kv_blocks * _block_bytes(model_config, settings.block_size, kv_dtype),
    )
    kernels = _cpu_kernels()
    weights = _load_weights(config, model_dir, model_config, precision, kernels)
    cache = KvCacheShape(settings.num_kv_blocks, settings.block_size, kv_dtype)
    runner = ModelRunner(build_decoder(model_config, weights, kernels, cache, settings.max_model_len), settings)
    runner.warm_up(settings)
    dtype = model_config.dtype if config.dtype == "auto" else config.dtype
    return LoadedModel(runner, settings, config.model or default_model.NAME, dtype, "cpu")


def _cpu_kernels() -> Kernels:
    try:
        kernels = CpuKernels(cache_dir() / "kernels")
    except CompileError as error:
        logger.warning("no C++ kernels, falling back to several times slower ones in torch: %s", error)
        return ReferenceKernels()
    torch.set_num_threads(1)  # what is left to torch is small, and its idle threads would spin on the kernels' cores
    return kernels


def _weight_bytes(config: EngineConfig, model_dir: Path, model_config: ModelConfig, precision: Precision) -> int:
    """What the weights will take: they are held as the files hold them, unless asked otherwise."""
    if config.load_format == "auto" and precision == Precision():
        return checkpoint_bytes(model_dir)
    itemsize = 1 if precision.int8 else (precision.dtype or DTYPES[model_config.dtype]).itemsize
    return model_config.num_parameters * itemsize


def _load_weights(
    config: EngineConfig, model_dir: Path, model_config: ModelConfig, precision: Precision, kernels: Kernels
) -> Weights:
    match config.load_format:
        case "auto":
            return load_weights(model_dir, model_config, precision, kernels)
        case "dummy":
            random = RandomTensors(config.seed, DTYPES[model_config.dtype])
            return assemble(random, model_config, precision, kernels)
    raise StartupError(f"load format {config.load_format} is not supported; choose auto or dummy")


def _resolve_settings(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype) -> SchedulerSettings:
    kv_cache_bytes = DEFAULT_KV_CACHE_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
    num_kv_blocks = kv_cache_bytes // _block_bytes(model_config, config.block_size, dtype)
    num_kv_tokens, longest = num_kv_blocks * config.block_size, model_config.max_position_embeddings
    if config.block_size < 16 or config.block_size % 16:
        raise StartupError(f"block size {config.block_size} is not supported; choose a multiple of 16")
    if config.max_model_len is not None and config.max_model_len > longest:
        raise StartupError(f"max model length {config.max_model_len} is beyond the model's context of {longest} tokens")
    if num_kv_blocks < 1 or (config.max_model_len or 0) > num_kv_tokens:
        raise StartupError(
            f"a KV cache of {kv_cache_bytes / 2**20:.0f} MiB holds only {num_kv_tokens} tokens of this model, less than "
            f"one request of max model length {config.max_model_len or longest}: give it more or lower that length"
        )
    return SchedulerSettings(
        scheduling_policy=config.scheduling_policy,
        max_num_seqs=config.max_num_seqs or DEFAULT_MAX_NUM_SEQS,
        max_num_batched_tokens=config.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS,
        max_model_len=config.max_model_len or min(longest, num_kv_tokens),
        num_kv_blocks=num_kv_blocks,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
    )


def _block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize
