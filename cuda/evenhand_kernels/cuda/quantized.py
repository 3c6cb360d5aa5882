"""QuantizedLinears: products with weights that stay codes of 4 or 8 bits in the device's memory.

Few rows, as in decodes, are multiplied by quantized_linear.cu, which reads the codes once. For many rows the weight is made a
matrix of elements first, in memory that all weights share, and torch multiplies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evenhand_kernels.cuda import variants
from evenhand_kernels.device import Device
from evenhand_kernels.kernels import Linear
from evenhand_kernels.quantized import QuantizedTensor

RUN = 32
"""Columns that a thread takes at a time: groups are multiples of it."""

OUTPUTS = 32
"""Of a block of quantized_linear.cu."""

MOST_ROWS = 128
"""Multiplied from the codes: by then making elements of them anew for each 64 rows costs as much as a matrix of them does."""


class QuantizedLinears:
    """Makes the products of one model, whose activations are `dtype`."""

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._matrix = torch.empty(0, dtype=dtype, device=device.torch_device)

    @staticmethod
    def can_take(weight: QuantizedTensor) -> bool:
        """Whether the kernels read this form: groups of 32 columns or multiples of it, and outputs in eights."""
        return weight.group % RUN == 0 and weight.shape[0] % 8 == 0

    def linear(self, weight: QuantizedTensor, bias: Tensor | None) -> Linear:
        """x @ weight.T + bias, for x [num_rows, columns] of the activations' dtype."""
        (outputs, columns), group, where = weight.shape, weight.group, self._device.torch_device
        codes, factors = weight.codes.contiguous().to(where), factors_of(weight).to(where)
        bias = None if bias is None else bias.to(where, self._dtype)
        few = {
            rows: self._device.load(variants.quantized_linear(self._dtype, weight.bits, rows, fp8=weight.is_float))
            for rows in variants.QUANTIZED_ROWS
        }
        dequantize = self._device.load(variants.dequantize(self._dtype, weight.bits, fp8=weight.is_float))
        if self._matrix.numel() < outputs * columns:
            self._matrix = self._matrix.new_empty(outputs * columns)

        def multiply_codes(x: Tensor) -> Tensor:
            output = x.new_empty(len(x), outputs)
            rows = next((rows for rows in few if rows >= len(x)), variants.QUANTIZED_ROWS[-1])
            few[rows](
                (-(-outputs // OUTPUTS), -(-len(x) // rows)),
                x=x,
                codes=codes,
                factors=factors,
                bias=bias,
                output=output,
                num_rows=len(x),
                outputs=outputs,
                columns=columns,
                group=group,
            )
            return output

        def multiply_matrix(x: Tensor) -> Tensor:
            matrix = self._matrix[: outputs * columns].view(outputs, columns)
            blocks = -(-outputs * columns // (RUN * 256))
            dequantize(blocks, codes=codes, factors=factors, output=matrix, rows=outputs, columns=columns, group=group)
            return F.linear(x, matrix, bias)

        return lambda x: multiply_codes(x) if len(x) <= MOST_ROWS else multiply_matrix(x)


def factors_of(weight: QuantizedTensor) -> Tensor:
    """float32 [rows, groups, 2]: quantized.cuh."""
    scales = weight.scales.float()
    minima = torch.zeros_like(scales) if weight.minima is None else weight.minima.float()
    if weight.is_float:
        return torch.stack((scales, minima), dim=-1).contiguous()
    steps, zero = (16, 16) if weight.bits == 4 else (256, 256 + 128)
    return torch.stack((steps * scales, minima - zero * scales), dim=-1).contiguous()
