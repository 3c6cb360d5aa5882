"""Weights as AWQ and GPTQ store them: integers packed into int32 words, as `QuantizedTensor`. Nothing is rounded.

A projection P is P.qweight, P.qzeros and P.scales, transposed: inputs are rows. A weight is (code - zero) * scale.

    AWQ   qweight [inputs, outputs / 8]; eight codes of a word are outputs 0 2 4 6 1 3 5 7; qzeros likewise
    GPTQ  qweight [inputs / codes of a word, outputs], in order; qzeros [groups, outputs / codes of a word], less one but
          in format gptq_v2; g_idx [inputs] names each input's group
"""

from collections.abc import Callable

import torch
from torch import Tensor

from evenhand_engine.errors import StartupError
from evenhand_engine.model.packed_format import PackedFormat
from evenhand_kernels.quantized import QuantizedTensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which place of a word each of eight outputs lies."""


def read_packed(
    read: Callable[[str], Tensor], has: Callable[[str], bool], prefix: str, packed: PackedFormat
) -> QuantizedTensor:
    """The weight of the projection `prefix`, [outputs, inputs]; `read` takes a tensor of the checkpoint by its name."""
    qweight, qzeros = read(f"{prefix}.qweight"), read(f"{prefix}.qzeros")
    scales = read(f"{prefix}.scales").float()  # [groups, outputs]
    if packed.method == "awq":
        codes = _unpacked(qweight, 4)[..., AWQ_ORDER].flatten(1)
        zeros = _unpacked(qzeros, 4)[..., AWQ_ORDER].flatten(1)
    else:
        codes = _unpacked(qweight, packed.bits).transpose(1, 2).flatten(0, 1)
        zeros = _unpacked(qzeros, packed.bits).flatten(1)
        if has(f"{prefix}.g_idx"):
            _require_groups_in_order(read(f"{prefix}.g_idx"), len(scales), prefix)
    minima = -(zeros + packed.zero_offset).float() * scales
    codes = codes.T.contiguous()
    if packed.bits == 4:
        codes = codes.to(torch.uint8)
        return QuantizedTensor(codes[:, 0::2] | codes[:, 1::2] << 4, scales.T.contiguous(), minima.T.contiguous())
    signed = (codes - 128).to(torch.int8)
    return QuantizedTensor(signed, scales.T.contiguous(), (minima + 128 * scales).T.contiguous())


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes of each word from its lowest bits on: [rows, columns, 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return words[:, :, None] >> shifts & (1 << bits) - 1


def _require_groups_in_order(groups: Tensor, num_groups: int, prefix: str) -> None:
    expected = torch.arange(len(groups)) // (len(groups) // num_groups)
    if not groups.equal(expected.to(groups.dtype)):
        raise StartupError(
            f"tensor {prefix}.g_idx: groups of inputs that are not neighbours (desc_act) are not supported; "
            "use a checkpoint that was quantised without desc_act"
        )
