"""Weights as fp8 checkpoints store them: e4m3 with scales in float32, as `QuantizedTensor`. Nothing is rounded.

A projection P is P.weight, float8_e4m3fn [outputs, inputs], times P.weight_scale_inv or P.weight_scale: one number, one for
each output, or one for each block of outputs and inputs. What P.input_scale says of activations is not needed: they stay as
they are.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from evenhand_engine.errors import StartupError
from evenhand_engine.model.packed_format import Fp8Format
from evenhand_kernels.quantized import QuantizedTensor

SCALES = ("weight_scale_inv", "weight_scale")


def has_fp8(has: Callable[[str], bool], prefix: str) -> bool:
    """Whether the projection `prefix` is stored so: others of the checkpoint may not be."""
    return any(has(f"{prefix}.{name}") for name in SCALES)


def read_fp8(
    read: Callable[[str], Tensor], has: Callable[[str], bool], prefix: str, form: Fp8Format
) -> QuantizedTensor:
    """The weight of the projection `prefix`; `read` takes a tensor of the checkpoint by its name. Raises StartupError."""
    codes = read(f"{prefix}.weight")
    name = next(name for name in SCALES if has(f"{prefix}.{name}"))
    scales = read(f"{prefix}.{name}").float()
    if has(f"{prefix}.input_scale"):
        read(f"{prefix}.input_scale")
    if codes.dtype != torch.float8_e4m3fn or codes.dim() != 2:
        raise StartupError(f"tensor {prefix}.weight is no matrix of float8_e4m3fn, but there is a {prefix}.{name}")
    return QuantizedTensor(codes, _by_group(scales, codes, form, f"{prefix}.{name}"))


def _by_group(scales: Tensor, codes: Tensor, form: Fp8Format, name: str) -> Tensor:
    """[outputs, groups of inputs]."""
    outputs, inputs = codes.shape
    if scales.numel() == 1:
        return scales.reshape(1, 1).repeat(outputs, 1)
    if scales.numel() == outputs and scales.shape[0] == outputs:
        return scales.reshape(outputs, 1)
    if form.block is None:
        raise StartupError(f"tensor {name} has shape {list(scales.shape)}: neither one number nor one for each output")
    high, wide = form.block
    if tuple(scales.shape) != (-(-outputs // high), -(-inputs // wide)):
        raise StartupError(f"tensor {name} has shape {list(scales.shape)}, which is no block of {high} x {wide} each")
    group = math.gcd(wide, inputs)  # the last block may be cut off
    by_output = scales.repeat_interleave(high, 0)[:outputs]
    return by_output.repeat_interleave(wide // group, 1)[:, : inputs // group].contiguous()
