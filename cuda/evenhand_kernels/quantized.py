"""QuantizedTensor: a weight as codes of 4 to 8 bits with scales, the form in which GGUF, AWQ, GPTQ and fp8 checkpoints store it.

A weight is code * scale + minimum, where runs of `group` columns share a scale and a minimum. All of these formats are
this one with other group sizes: nothing is rounded when they are brought into it. GGUF's K-quants have two levels of scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

SUPER_BLOCK = 256
"""Columns that share a factor of their scales."""

INT8_GROUP = 32
"""Columns that share a scale in weights that are quantised here."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix [rows, columns].

    Attributes:
        codes: int8 [rows, columns], or uint8 [rows, columns / 2] with two unsigned codes of 4 bits each, the even
            column's in the low half; or float8_e4m3fn [rows, columns].
        scales: float16 or float32 [rows, columns / group].
        minima: like `scales`; None: all zero, which only codes of 8 bits may have, and floats must.
        factors: float16 [rows, columns / SUPER_BLOCK, 2 or 1], what scales and minima are to be multiplied with, which are
            integers of 8 bits then. Such codes are uint8 [rows, columns / 8 * bits], of 4, 5 or 6 bits as `packed_codes` makes
            them; where there are no minima, they stand for numbers that are less by half of their range. None: 1.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None
    factors: Tensor | None = None

    @property
    def bits(self) -> int:
        if self.factors is not None:
            return self.codes.shape[1] * 8 // (self.factors.shape[1] * SUPER_BLOCK)
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def is_float(self) -> bool:
        """Whether its codes are floats of 8 bits."""
        return self.codes.is_floating_point()

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.codes.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it consists of, by the names of the attributes."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    def rows(self, ids: Tensor | slice) -> "QuantizedTensor":
        """Some rows, in this order."""
        return QuantizedTensor(**{name: part[ids] for name, part in self.parts().items()})

    def dequantized(self) -> Tensor:
        """The weights, float32 [rows, columns]."""
        plain = self.one_level()
        grouped = plain._unpacked().view(len(self.codes), -1, self.group).float()
        weights = grouped * plain.scales.float()[:, :, None]
        if plain.minima is not None:
            weights += plain.minima.float()[:, :, None]
        return weights.flatten(1)

    def one_level(self) -> "QuantizedTensor":
        """The same weights without `factors`: codes of 4 or 8 bits, and the products of scales and factors in float32."""
        if self.factors is None:
            return self
        factors = self.factors.float().repeat_interleave(SUPER_BLOCK // self.group, dim=1)
        codes = self.codes if self.bits == 4 else self._unpacked()
        minima = None if self.minima is None else self.minima * factors[:, :, 1]
        return QuantizedTensor(codes, self.scales * factors[:, :, 0], minima)

    def _unpacked(self) -> Tensor:
        """The codes one by one, int8 or float8_e4m3fn [rows, columns]."""
        if self.bits == 8:
            return self.codes
        if self.factors is not None:
            eights = self.codes.view(len(self.codes), -1, self.bits)
            codes = torch.stack((eights[:, :, :4] & 15, eights[:, :, :4] >> 4), dim=3).flatten(2)
            for bit in range(4, self.bits):
                codes |= (eights[:, :, bit : bit + 1] >> torch.arange(8, dtype=torch.uint8) & 1) << bit
            return codes.flatten(1).to(torch.int8) - (0 if self.minima is not None else 1 << self.bits - 1)
        return torch.stack((self.codes & 15, self.codes >> 4), dim=2).flatten(1).to(torch.int8)

    @property
    def _form(self) -> tuple[object, ...]:
        """Equal for those whose parts can lie one above the other."""
        return self.group, *((name, part.dtype, part.shape[1:]) for name, part in self.parts().items())

    def _like(self, others: Sequence["QuantizedTensor"]) -> "QuantizedTensor":
        """The same weights in the narrowest form that holds those of `others` too."""
        group = min(other.group for other in others)
        dtype = max((other.scales.dtype for other in others), key=lambda dtype: dtype.itemsize)
        minima = self.minima
        if minima is None and any(other.minima is not None for other in others):
            minima = torch.zeros_like(self.scales)

        def fine(values: Tensor) -> Tensor:
            return values.to(dtype).repeat_interleave(self.group // group, dim=1)

        codes = self.codes if all(other.bits == 4 for other in others) else self._unpacked()
        return QuantizedTensor(codes, fine(self.scales), None if minima is None else fine(minima))


Weight = Tensor | QuantizedTensor


def widened(weight: Weight) -> Tensor:
    """The weight in float32."""
    return weight.dequantized() if isinstance(weight, QuantizedTensor) else weight.float()


def stacked(weights: Sequence[Weight]) -> Weight:
    """The matrices one above the other, exactly: in their own form if they share one, else in the narrowest for all."""
    quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    if len(quantized) == len(weights) and len({weight._form for weight in quantized}) == 1:
        parts = [weight.parts() for weight in quantized]
        return QuantizedTensor(**{name: torch.cat([each[name] for each in parts]) for name in parts[0]})
    if not quantized:
        tensors = [weight for weight in weights if isinstance(weight, Tensor)]
        return torch.cat([weight.to(_common_dtype(tensors)) for weight in tensors])
    if len(quantized) < len(weights) or len({weight.is_float for weight in quantized}) > 1:
        return torch.cat([widened(weight) for weight in weights])
    quantized = [weight.one_level() for weight in quantized]
    alike = [weight._like(quantized) for weight in quantized]
    minima = [weight.minima for weight in alike if weight.minima is not None]
    return QuantizedTensor(
        torch.cat([weight.codes for weight in alike]),
        torch.cat([weight.scales for weight in alike]),
        torch.cat(minima) if minima else None,
    )


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [rows, columns], as eight in `bits` bytes: four of their lower halves, two of them in a byte, then for each bit
    above one byte, from the first code's lowest on. Of 4 bits: two neighbours in a byte."""
    eights = codes.view(len(codes), -1, 8)
    halves = eights[:, :, 0::2] & 15 | eights[:, :, 1::2] << 4
    places = torch.arange(8, dtype=torch.uint8)
    above = [((eights >> bit & 1) << places).sum(2, keepdim=True, dtype=torch.uint8) for bit in range(4, bits)]
    return torch.cat([halves, *above], dim=2).flatten(1)


def quantized_to_int8(weight: Tensor) -> QuantizedTensor:
    """The nearest codes in [-127, 127] with a scale for each INT8_GROUP columns, which must divide their number."""
    grouped = weight.float().view(len(weight), -1, INT8_GROUP)
    scales = (grouped.abs().amax(dim=2) / 127).half()
    codes = (grouped / scales.float().clamp_min(torch.finfo(torch.float16).smallest_normal)[:, :, None]).round()
    return QuantizedTensor(codes.clamp(-127, 127).to(torch.int8).flatten(1), scales)
