"""Precision: in which form weights and KV cache are held, resolved from the settings and the checkpoint."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config import ModelConfig
from evenhand_kernels.quantized import INT8_GROUP, Weight, quantized_to_int8, widened

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ACTIVATION_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int16": torch.int16,
}
QUANTIZATIONS = ("none", "int8")
FP8 = "fp8"
"""Of a KV cache on a GPU: e4m3."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The form of the weights.

    Attributes:
        dtype: of all weights; None: each as the checkpoint stores it, quantised ones included.
        int8: quantise what is not after that, with a scale for each INT8_GROUP inputs.
    """

    dtype: torch.dtype | None = None
    int8: bool = False

    def of(self, weight: Weight) -> Weight:
        """A matrix in this form."""
        if self.dtype is not None:
            weight = widened(weight).to(self.dtype)
        if self.int8 and isinstance(weight, Tensor) and weight.shape[1] % INT8_GROUP == 0:
            return quantized_to_int8(weight)
        return weight


def resolve_precision(dtype: str, quantization: str) -> Precision:
    """`--dtype` and `--quantization`. Raises StartupError for names that are unknown or contradict each other."""
    if dtype not in ("auto", *DTYPES):
        raise StartupError(f"dtype {dtype} is not supported; choose auto, {', '.join(DTYPES)}")
    if quantization not in QUANTIZATIONS:
        raise StartupError(f"quantization {quantization} is not supported; choose {', '.join(QUANTIZATIONS)}")
    if quantization != "none" and dtype != "auto":
        raise StartupError(f"quantization {quantization} and dtype {dtype} exclude each other: leave one of them out")
    return Precision(DTYPES.get(dtype), quantization == "int8")


def resolve_activation_dtype(activation_dtype: str) -> torch.dtype | None:
    """`--activation-dtype` on the CPU; None for auto: what suits processor and weight (`CpuKernels`)."""
    return None if activation_dtype == "auto" else ACTIVATION_DTYPES[activation_dtype]


def resolve_kv_cache_dtype(kv_cache_dtype: str, dtype: str, config: ModelConfig) -> torch.dtype:
    """`--kv-cache-dtype` on the CPU; auto: that of the weights, or what the checkpoint's config names. Raises StartupError."""
    name = kv_cache_dtype
    if name == FP8:
        raise StartupError(
            f"KV cache dtype fp8 is for the kernels of a GPU; on the CPU choose auto, {', '.join(DTYPES)}"
        )
    if name == "auto":
        name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise StartupError(f"KV cache dtype {kv_cache_dtype} is not supported; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_device_kv_dtype(kv_cache_dtype: str, dtype: torch.dtype, config: ModelConfig) -> torch.dtype:
    """`--kv-cache-dtype` on a GPU that computes in `dtype`. Raises StartupError."""
    if kv_cache_dtype == FP8:
        if config.head_dim % 32:
            raise StartupError(
                f"KV cache dtype fp8 needs heads of a multiple of 32, and this model's have {config.head_dim}; choose auto"
            )
        return torch.float8_e4m3fn
    if kv_cache_dtype != "auto" and DTYPES.get(kv_cache_dtype) != dtype:
        raise StartupError(
            f"KV cache dtype {kv_cache_dtype} is not supported on a GPU that computes in {name_of(dtype)}; choose auto or fp8"
        )
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """As the options name it."""
    return next(name for name, known in DTYPES.items() if known == dtype)
