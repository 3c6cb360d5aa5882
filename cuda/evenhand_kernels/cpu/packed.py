"""Packed: a weight in the layout of weight.h, which the kernels in C++ read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from evenhand_kernels.cpu.native import Native, PartsStructure, WeightStructure
from evenhand_kernels.quantized import QuantizedTensor, Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of plain formats in formats.h, and of those of a KV cache."""

QUANTIZED = 3
"""The first of the numbers that stand for quantised formats there."""

MAX_GROUP = 256


@dataclass(frozen=True, slots=True)
class Packed:
    """`memory` is what the structure points to."""

    structure: WeightStructure
    memory: tuple[Tensor, ...]


def packed(native: Native, weight: Weight, bias: Tensor | None = None, *, gated: bool = False) -> Packed:
    """Raises ValueError for groups that the kernels do not take."""
    if isinstance(weight, QuantizedTensor) and weight.is_float:
        weight = weight.dequantized().bfloat16()  # these kernels have no fp8
    structure = WeightStructure(outputs=weight.shape[0], inputs=weight.shape[1], gated=gated, group=1)
    if isinstance(weight, QuantizedTensor):
        structure.format = _quantized_format(weight)
        structure.group = weight.group
        if weight.group % 8 or weight.group > MAX_GROUP:
            raise ValueError(f"groups of {weight.group} inputs: they must be multiples of 8 up to {MAX_GROUP}")
        parts = {name: part.contiguous() for name, part in weight.parts().items()}
    else:
        structure.format = DTYPES[weight.dtype]
        parts = {"codes": weight.contiguous()}
    memory = native.allocate(native.library.evenhand_packed_bytes(structure))
    structure.packed = memory.data_ptr()
    pointers = PartsStructure(**{name: part.data_ptr() for name, part in parts.items()})
    native.library.evenhand_pack(native.pool, structure, pointers)
    if bias is None:
        return Packed(structure, (memory,))
    packed_bias = packed(native, bias.float()[:, None], gated=gated)
    structure.bias = packed_bias.structure.packed
    return Packed(structure, (memory, *packed_bias.memory))


def _quantized_format(weight: QuantizedTensor) -> int:
    """The number that formats.h has for it."""
    if weight.factors is not None:
        assert (weight.group, weight.minima is None) == ((16, True) if weight.bits == 6 else (32, False)), "no K-quant"
        return QUANTIZED + 2 + weight.bits
    kind = 0 if weight.bits == 4 else 1 if weight.minima is None else 2
    return QUANTIZED + kind + 3 * (weight.scales.dtype == torch.float32)
