"""How near a server at one stream comes to what the machine can do."""

import argparse
from collections.abc import Sequence

from machine_limits import Limits
from step_floor import Floor

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import weight_bytes
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.precision import (
    DTYPES,
    resolve_activation_dtype,
    resolve_kv_cache_dtype,
    resolve_precision,
)
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.scheduler.batch import ScheduledRequest
from evenhand_kernels.cpu.kernels import CpuKernels


def fractions(
    limits: Limits, model: str | None, flags: Sequence[str], num_prompt: int, num_output: int, ttft: float, tpot: float
) -> dict[str, float]:
    """Of the machine's limits, by the seconds to the first token and between two tokens.

    Seconds are those of the client, so what HTTP, tokenizer and scheduler take counts as time that the machine was idle.
    """
    parser = argparse.ArgumentParser()
    for name in ("dtype", "kv-cache-dtype", "activation-dtype"):
        parser.add_argument(f"--{name}", default="auto")
    parser.add_argument("--quantization", default="none")
    options, _ = parser.parse_known_args(flags)
    model_dir = resolve_model_dir(model)
    config, precision = load_model_config(model_dir), resolve_precision(options.dtype, options.quantization)
    num_bytes = weight_bytes(EngineConfig(model=model), model_dir, config, precision)
    is_coded = num_bytes < 2 * config.num_parameters
    activation_dtype = resolve_activation_dtype(options.activation_dtype)
    kernels = CpuKernels(cache_dir() / "kernels", activation_dtype=activation_dtype)
    peak = limits.flops[kernels.multiplied_as(None if is_coded else precision.dtype or DTYPES[config.dtype])]
    kv_dtype = resolve_kv_cache_dtype(options.kv_cache_dtype, options.dtype, config)
    floor = Floor(peak, limits.bandwidth, config, num_bytes / config.num_parameters, kv_dtype.itemsize)
    operations, _ = floor.work([ScheduledRequest(0, 0, num_prompt, 1, ())])
    _, read = floor.work([ScheduledRequest(0, num_prompt + num_output // 2, 1, 1, ())])
    return {
        "bandwidth_gb_per_s": limits.bandwidth / 1e9,
        "bandwidth_fraction": read / tpot / limits.bandwidth,
        "matmul_gflop_per_s": peak / 1e9,
        "matmul_fraction": operations / ttft / peak,
    }
