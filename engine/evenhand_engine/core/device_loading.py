"""Loads a model onto a GPU, or onto the emulated one: kernels, weights, and a KV cache of what memory is left."""

import ctypes
import logging
from dataclasses import replace
from pathlib import Path

import torch

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.device_runner import DeviceRunner
from evenhand_engine.core.loading import (
    Defaults,
    LoadedModel,
    block_bytes,
    make_weights,
    resolve_settings,
    weight_bytes,
)
from evenhand_engine.core.structures import Structures
from evenhand_engine.core.warm_up import run_largest_step
from evenhand_engine.errors import StartupError
from evenhand_engine.model import default_model
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import ModelConfig
from evenhand_engine.model.decoder import build_decoder
from evenhand_engine.model.precision import DTYPES, Precision, name_of, resolve_device_kv_dtype, resolve_precision
from evenhand_engine.model.progress import Stage
from evenhand_engine.model.sharding import WHOLE, Shard
from evenhand_engine.model.weights import Weights
from evenhand_kernels.cpu.library import CompileError as NoCompilerError
from evenhand_kernels.cpu.library import load_planner
from evenhand_kernels.cuda.device import CudaDevice
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.device import CompileError, Device, DeviceError
from evenhand_kernels.emulation.device import EmulatedDevice
from evenhand_kernels.kernels import KvCacheShape

logger = logging.getLogger(__name__)

DEFAULTS = Defaults(max_num_seqs=256, max_num_batched_tokens=2048, target_step_ms=0)
VECTOR = 8
"""Numbers of 16 bits that a kernel reads at a time."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def load_on_device(
    config: EngineConfig, model_dir: Path, model_config: ModelConfig, shard: Shard = WHOLE
) -> LoadedModel:
    """`model_config` is that of the shard. Raises StartupError: no such device, kernels that do not compile, or too little memory."""
    _require_vectors(model_config, shard)
    dtype = _dtype(config, model_config)
    kv_dtype = resolve_device_kv_dtype(config.kv_cache_dtype, dtype, model_config)
    precision = resolve_precision(config.dtype, config.quantization)
    try:
        device = _device(config, shard)
        with device.stream():  # that the runner uses: no other is in order with it
            return _load(config, model_dir, model_config, dtype, kv_dtype, precision, device, shard)
    except (DeviceError, CompileError) as error:
        raise StartupError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise StartupError(
            f"the device ran out of memory while the model was loaded: {error}; lower --gpu-memory-utilization, "
            "--max-num-batched-tokens or --max-num-seqs, or choose a smaller model"
        ) from error


def _load(
    config: EngineConfig,
    model_dir: Path,
    model_config: ModelConfig,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    precision: Precision,
    device: Device,
    shard: Shard,
) -> LoadedModel:
    """`dtype` of activations and all weights that `precision` leaves unquantised."""
    free, total = device.memory()
    needed = min(weight_bytes(config, model_dir, model_config, precision), model_config.num_parameters * dtype.itemsize)
    if needed > free:
        raise StartupError(
            f"too little memory on {device.name}: the weights need {_gib(needed)}, {_gib(free)} of {_gib(total)} are "
            "free: stop what else runs there, share the model between GPUs (--tensor-parallel-size), hold its weights in less "
            "(--quantization int8), or choose a smaller one"
        )
    Stage("preparing the kernels", total=0)
    kernels = CudaKernels(device, dtype, planner=_planner())
    weights = make_weights(config, model_dir, model_config, precision, kernels, shard)
    return _with_cache(config, model_dir, model_config, kv_dtype, kernels, weights, shard)


def _require_vectors(model_config: ModelConfig, shard: Shard) -> None:
    """Kernels read and write 16 bytes at a time. Raises StartupError."""
    for name in ("hidden_size", "intermediate_size"):
        if (size := getattr(model_config, name)) % VECTOR:
            part = f" on each of {shard.size} GPUs" if shard.size > 1 else ""
            raise StartupError(
                f"{name} {size}{part} is not supported on a GPU: it must be a multiple of {VECTOR}; choose another model, "
                "another --tensor-parallel-size, or --device cpu"
            )


def _device(config: EngineConfig, shard: Shard) -> Device:
    if config.device == "emulated":
        return EmulatedDevice(cache_dir() / "kernels", checked=False)
    return CudaDevice(shard.rank)


def _planner() -> ctypes.CDLL | None:
    """Of the steps' attention, compiled; without a compiler the engine does with numpy."""
    try:
        return load_planner(cache_dir() / "kernels")
    except NoCompilerError as error:
        logger.warning("steps are planned in Python, which takes some 0.1 ms longer for each: %s", error)
        return None


def _dtype(config: EngineConfig, model_config: ModelConfig) -> torch.dtype:
    """Of weights and activations: tensor cores compute in 16 bits."""
    if config.dtype == "auto":
        dtype = DTYPES[model_config.dtype]
        return dtype if dtype in SIXTEEN_BITS else torch.bfloat16
    dtype = DTYPES.get(config.dtype, torch.float32)
    if dtype not in SIXTEEN_BITS:
        raise StartupError(f"dtype {config.dtype} is not supported on a GPU; choose auto, bfloat16 or float16")
    return dtype


def _with_cache(
    config: EngineConfig,
    model_dir: Path,
    model_config: ModelConfig,
    kv_dtype: torch.dtype,
    kernels: CudaKernels,
    weights: Weights,
    shard: Shard,
) -> LoadedModel:
    structures = Structures(model_config.vocab_size, shard.share)

    def make_runner(config: EngineConfig, kv_cache_bytes: int) -> DeviceRunner:
        settings = resolve_settings(config, model_config, kv_dtype, kv_cache_bytes, DEFAULTS)
        cache = KvCacheShape(settings.num_kv_blocks, settings.block_size, kv_dtype)
        decoder = build_decoder(model_config, weights, kernels, cache, settings.max_model_len)
        return DeviceRunner(decoder, kernels, settings, model_config.vocab_size, structures)

    Stage("warming up", total=0)
    kv_cache_bytes = config.kv_cache_bytes
    if kv_cache_bytes is None:
        num_tokens = config.max_num_batched_tokens or DEFAULTS.max_num_batched_tokens
        trial_bytes = (num_tokens // config.block_size + 2) * block_bytes(model_config, config.block_size, kv_dtype)
        trial = make_runner(replace(config, max_model_len=None), trial_bytes)
        run_largest_step(
            trial, trial.settings, scores_prompt=True
        )  # what its activations take stays with torch, and is no longer free
        del trial
        kv_cache_bytes = shard.least(_left_for_cache(kernels.device, config.gpu_memory_utilization))
    runner = make_runner(config, kv_cache_bytes)
    runner.warm_up()
    device = kernels.device
    settings = runner.settings
    logger.info("%s: %d KV blocks of %d tokens", device.name, settings.num_kv_blocks, settings.block_size)
    return LoadedModel(
        runner,
        settings,
        config.model or default_model.NAME,
        name_of(kernels.dtype),
        device.name,
        model_dir,
        structures,
        scores_prompts=True,
    )


def _left_for_cache(device: Device, utilization: float) -> int:
    """Bytes that the engine may still take."""
    free, total = device.memory()
    left = free - round((1 - utilization) * total)
    if left <= 0:
        raise StartupError(
            f"no memory is left on {device.name} for the KV cache: {_gib(free)} of {_gib(total)} are free, and "
            f"--gpu-memory-utilization {utilization} keeps {_gib(round((1 - utilization) * total))} of it free: raise it, lower "
            "--max-num-batched-tokens, or choose a smaller model"
        )
    return left


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
