"""load_model: from the engine's settings to a runner that is warm, on the device that they name."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evenhand_engine.config import EngineConfig, SchedulerSettings
from evenhand_engine.core.model_runner import ModelRunner
from evenhand_engine.core.structures import Structures
from evenhand_engine.core.warm_up import measured_token_budget, run_largest_step
from evenhand_engine.core.workers import Lost, end_process
from evenhand_engine.errors import StartupError
from evenhand_engine.model import default_model
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import ModelConfig, load_model_config
from evenhand_engine.model.decoder import build_decoder
from evenhand_engine.model.memory import require_memory
from evenhand_engine.model.precision import (
    DTYPES,
    Precision,
    resolve_activation_dtype,
    resolve_kv_cache_dtype,
    resolve_precision,
)
from evenhand_engine.model.progress import Stage
from evenhand_engine.model.sharding import WHOLE, Shard, sharded_config
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.model.weights import RandomTensors, Weights, assemble, checkpoint_bytes, load_weights
from evenhand_engine.scheduler.batch import Runner
from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.cpu.library import CompileError
from evenhand_kernels.kernels import Kernels, KvCacheShape
from evenhand_kernels.reference import ReferenceKernels

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda", "emulated")
KERNELS = ("auto", "reference")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a kind of device is started with where the settings do not say."""

    max_num_seqs: int
    max_num_batched_tokens: int
    target_step_ms: float


CPU_DEFAULTS = Defaults(max_num_seqs=32, max_num_batched_tokens=256, target_step_ms=200)
DEFAULT_KV_CACHE_BYTES = 1 << 30
DEFAULT_TARGET_COST = 0.015
"""See `SchedulerSettings.target_step_cost`: with what plans miss, at most 2 %. A step that somebody asks for is kept to,
whatever it costs."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to compute. `settings` has every default resolved."""

    runner: Runner
    settings: SchedulerSettings
    model_name: str
    dtype: str
    device: str
    directory: Path
    structures: Structures | None = None  # None: the runner knows no grammars
    scores_prompts: bool = False


def load_model(config: EngineConfig, lost: Lost = end_process) -> LoadedModel:
    """Load the model, allocate the KV cache and run once. Raises StartupError, before it loads where it can.

    `lost`: what to do, now or later, when a process that computes a part of the model is gone.
    """
    if config.device not in DEVICES:
        raise StartupError(f"device {config.device} is not supported; choose auto, cpu or cuda")
    if config.kernels not in KERNELS:
        raise StartupError(f"kernels {config.kernels} are not supported; choose auto or reference")
    if config.tensor_parallel_size > 1:
        from evenhand_engine.core.tensor_parallel import load_parallel

        return load_parallel(config, lost)
    return load_shard(config, WHOLE)


def resolve_shard(config: EngineConfig, shard: Shard) -> tuple[Path, ModelConfig, str]:
    """Where the model is, the config of this part of it, and the device. Raises StartupError, alike for all parts."""
    model_dir = resolve_model_dir(config.model)
    model_config = sharded_config(load_model_config(model_dir), shard)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if shard.size > 1 and device == "cpu" and config.kernels != "reference":
        raise StartupError("tensor parallelism is for GPUs: leave --tensor-parallel-size out on the CPU")
    if config.activation_dtype not in ("auto", "float32") and (device != "cpu" or config.kernels == "reference"):
        raise StartupError(f"activation dtype {config.activation_dtype} is for the CPU's own kernels: leave it out")
    return model_dir, model_config, device


def load_shard(config: EngineConfig, shard: Shard) -> LoadedModel:
    """Of the model that `shard` is a part of; all parts are loaded at the same time. Raises StartupError."""
    model_dir, model_config, device = resolve_shard(config, shard)
    if config.kernels == "reference":
        return _load_with(_reference_kernels(device, shard), config, model_dir, model_config, device, shard)
    if device == "cpu":
        return _load_with(_cpu_kernels(config), config, model_dir, model_config, device, shard)
    from evenhand_engine.core.device_loading import load_on_device

    return load_on_device(config, model_dir, model_config, shard)


def _load_with(
    kernels: Kernels, config: EngineConfig, model_dir: Path, model_config: ModelConfig, device: str, shard: Shard
) -> LoadedModel:
    """For a runner that does one step after the other, in float32."""
    precision = resolve_precision(config.dtype, config.quantization)
    kv_dtype = resolve_kv_cache_dtype(config.kv_cache_dtype, config.dtype, model_config)
    kv_cache_bytes = DEFAULT_KV_CACHE_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
    settings = resolve_settings(config, model_config, kv_dtype, kv_cache_bytes, CPU_DEFAULTS)
    require_memory(
        weights=weight_bytes(config, model_dir, model_config, precision),
        kv_cache=settings.num_kv_blocks * block_bytes(model_config, settings.block_size, kv_dtype),
    )
    weights = make_weights(config, model_dir, model_config, precision, kernels, shard)
    cache = KvCacheShape(settings.num_kv_blocks, settings.block_size, kv_dtype)
    structures = Structures(model_config.vocab_size, shard.share)
    decoder = build_decoder(model_config, weights, kernels, cache, settings.max_model_len)
    runner = ModelRunner(decoder, settings, structures)
    Stage("warming up", total=0)
    if config.max_num_batched_tokens is not None:
        run_largest_step(runner, settings)
    else:
        budget = measured_token_budget(runner, settings, _token_budgets(settings))
        settings = replace(settings, max_num_batched_tokens=budget)
    dtype = model_config.dtype if config.dtype == "auto" else config.dtype
    name = config.model or default_model.NAME
    return LoadedModel(runner, settings, name, dtype, device, model_dir, structures, scores_prompts=True)


def _token_budgets(settings: SchedulerSettings) -> Sequence[int]:
    """To choose from, up to the largest: with a token for each stream, as many are left for prompts."""
    most = settings.max_num_batched_tokens
    return [*(size for size in (64, 128) if 2 * settings.max_num_seqs <= size < most), most]


def _reference_kernels(device: str, shard: Shard) -> Kernels:
    if device != "cuda":
        return ReferenceKernels()
    if not torch.cuda.is_available():
        raise StartupError("torch finds no CUDA device: check nvidia-smi, and that torch was built with CUDA")
    return ReferenceKernels(torch.device("cuda", shard.rank))


def _cpu_kernels(config: EngineConfig) -> Kernels:
    Stage("preparing the kernels", total=0)  # a minute and more, where they are compiled
    try:
        kernels = CpuKernels(
            cache_dir() / "kernels", activation_dtype=resolve_activation_dtype(config.activation_dtype)
        )
    except CompileError as error:
        logger.warning("no C++ kernels, falling back to several times slower ones in torch: %s", error)
        return ReferenceKernels()
    if not kernels.has_products:
        dtype = config.activation_dtype
        logger.warning(
            "this processor does not multiply %s itself: --activation-dtype %s makes it slower", dtype, dtype
        )
    torch.set_num_threads(1)  # what is left to torch is small, and its idle threads would spin on the kernels' cores
    return kernels


def weight_bytes(config: EngineConfig, model_dir: Path, model_config: ModelConfig, precision: Precision) -> int:
    """What the weights will take: they are held as the files hold them, unless asked otherwise."""
    if config.load_format == "auto" and precision == Precision():
        return checkpoint_bytes(model_dir)
    itemsize = 1 if precision.int8 else (precision.dtype or DTYPES[model_config.dtype]).itemsize
    return model_config.num_parameters * itemsize


def make_weights(
    config: EngineConfig,
    model_dir: Path,
    model_config: ModelConfig,
    precision: Precision,
    kernels: Kernels,
    shard: Shard,
) -> Weights:
    match config.load_format:
        case "auto":
            return load_weights(model_dir, model_config, precision, kernels, shard)
        case "dummy":
            random = RandomTensors(config.seed, DTYPES[model_config.dtype])
            return assemble(random, model_config, precision, kernels, shard)
    raise StartupError(f"load format {config.load_format} is not supported; choose auto or dummy")


def resolve_settings(
    config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype, kv_cache_bytes: int, defaults: Defaults
) -> SchedulerSettings:
    """With a KV cache of `dtype` and that size. Raises StartupError where the settings contradict the model."""
    num_kv_blocks = kv_cache_bytes // block_bytes(model_config, config.block_size, dtype)
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
    target_step_ms = defaults.target_step_ms if config.target_step_ms is None else config.target_step_ms
    return SchedulerSettings(
        scheduling_policy=config.scheduling_policy,
        max_num_seqs=config.max_num_seqs or defaults.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or defaults.max_num_batched_tokens,
        max_model_len=config.max_model_len or min(longest, num_kv_tokens),
        num_kv_blocks=num_kv_blocks,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        target_step_seconds=target_step_ms / 1e3 or None,
        target_step_cost=DEFAULT_TARGET_COST if config.target_step_ms is None else 1.0,
        num_speculative_tokens=config.num_speculative_tokens if config.speculative == "ngram" else 0,
    )


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Of one KV block in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize
