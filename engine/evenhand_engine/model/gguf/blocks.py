"""The blocks of quantised GGUF tensors: codes, scales and minima as they are (ggml's `block_*` structs).

Kinds that are not in QUANTIZED come dequantised by the `gguf` library, as float16, whose rounding is far below theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor, dequantize
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.quantized import QuantizedTensor, Weight, packed_codes

Bytes = NDArray[np.uint8]
"""[num_blocks, bytes]: a part of every block."""

FLOAT_DTYPES = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Codes [num_blocks, codes of a block], int8 if they have 8 bits, else uint8; scales and minima [num_blocks, groups].

    `factors` of K-quants: [num_blocks, 2 or 1], what scales and minima are multiplied with.
    """

    bits: int
    codes: NDArray[np.uint8] | NDArray[np.int8]
    scales: NDArray[np.float16] | NDArray[np.uint8] | NDArray[np.int8]
    minima: NDArray[np.float16] | NDArray[np.uint8] | None = None
    factors: NDArray[np.float16] | None = None


def read_tensor(tensor: ReaderTensor) -> Weight:
    """The tensor, [rows, columns] or [columns]: floats in their own type, quantised ones as they are."""
    kind = GGMLQuantizationType(tensor.tensor_type)
    if kind not in QUANTIZED:
        values = np.array(dequantize(tensor.data, kind), dtype=np.float32)  # a copy, as below
        return torch.from_numpy(values).to(FLOAT_DTYPES.get(kind, torch.float16))
    num_bytes, read = QUANTIZED[kind]
    num_rows = len(tensor.data)
    blocks = read(tensor.data.reshape(-1, num_bytes))

    def part(values: NDArray[Any], *shape: int) -> Tensor:
        return torch.from_numpy(
            np.array(values.reshape(num_rows, -1, *shape))
        )  # a copy: the file's mapping is read-only

    codes = part(blocks.codes)
    return QuantizedTensor(
        codes if blocks.bits == 8 else packed_codes(codes, blocks.bits),
        part(blocks.scales),
        None if blocks.minima is None else part(blocks.minima),
        None if blocks.factors is None else part(blocks.factors, blocks.factors.shape[1]),
    )


def _q4_0(blocks: Bytes) -> Blocks:
    scales = _float16(blocks[:, 0:2])
    return Blocks(4, _nibbles(blocks[:, 2:18]), scales, scales * np.float16(-8))


def _q4_1(blocks: Bytes) -> Blocks:
    return Blocks(4, _nibbles(blocks[:, 4:20]), _float16(blocks[:, 0:2]), _float16(blocks[:, 2:4]))


def _q5_0(blocks: Bytes) -> Blocks:
    codes = _nibbles(blocks[:, 6:22]) | np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << 4
    return Blocks(8, codes.astype(np.int8) - 16, _float16(blocks[:, 0:2]))


def _q5_1(blocks: Bytes) -> Blocks:
    codes = _nibbles(blocks[:, 8:24]) | np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little") << 4
    return Blocks(8, codes.astype(np.int8), _float16(blocks[:, 0:2]), _float16(blocks[:, 2:4]))


def _q8_0(blocks: Bytes) -> Blocks:
    return Blocks(8, blocks[:, 2:34].view(np.int8), _float16(blocks[:, 0:2]))


def _q4_k(blocks: Bytes) -> Blocks:
    return Blocks(4, _nibble_runs(blocks[:, 16:144], 32), *_six_bit_scales(blocks))


def _q5_k(blocks: Bytes) -> Blocks:
    high = _fields(blocks[:, 16:48], 1)  # bit i of the 32 bytes belongs to the i-th run of 32 codes
    codes = _nibble_runs(blocks[:, 48:176], 32) | high << 4
    return Blocks(5, codes, *_six_bit_scales(blocks))


def _q6_k(blocks: Bytes) -> Blocks:
    high = np.concatenate([_fields(blocks[:, start : start + 32], 2) for start in (128, 160)], axis=1)
    codes = _nibble_runs(blocks[:, :128], 64) | high << 4
    return Blocks(6, codes, blocks[:, 192:208].view(np.int8), factors=_float16(blocks[:, 208:210]))


QUANTIZED: dict[GGMLQuantizationType, tuple[int, Callable[[Bytes], Blocks]]] = {
    GGMLQuantizationType.Q4_0: (18, _q4_0),
    GGMLQuantizationType.Q4_1: (20, _q4_1),
    GGMLQuantizationType.Q5_0: (22, _q5_0),
    GGMLQuantizationType.Q5_1: (24, _q5_1),
    GGMLQuantizationType.Q8_0: (34, _q8_0),
    GGMLQuantizationType.Q4_K: (144, _q4_k),
    GGMLQuantizationType.Q5_K: (176, _q5_k),
    GGMLQuantizationType.Q6_K: (210, _q6_k),
}
"""Bytes of a block, and its reader."""


def _float16(part: Bytes) -> NDArray[np.float16]:
    """[num_blocks, 1]"""
    return np.ascontiguousarray(part).view(np.float16)


def _nibbles(part: Bytes) -> Bytes:
    """The low halves of the bytes, then the high ones."""
    return np.concatenate((part & 15, part >> 4), axis=1)


def _nibble_runs(part: Bytes, run: int) -> Bytes:
    """The same for each run of bytes."""
    return np.concatenate([_nibbles(part[:, start : start + run]) for start in range(0, part.shape[1], run)], axis=1)


def _fields(part: Bytes, width: int) -> Bytes:
    """The lowest `width` bits of all bytes, then the next, and so on."""
    return np.concatenate([part >> shift & (1 << width) - 1 for shift in range(0, 8, width)], axis=1)


def _six_bit_scales(blocks: Bytes) -> tuple[Bytes, Bytes, NDArray[np.float16]]:
    """Scales and minima of the eight runs of 32 codes: 6-bit numbers in 12 bytes, times a float16 each, the second one negative."""
    low, middle, high = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate((low & 63, high & 15 | low >> 6 << 4), axis=1)
    minima = np.concatenate((middle & 63, high >> 4 | middle >> 6 << 4), axis=1)
    factors = _float16(blocks[:, 0:4]) * np.array([1, -1], np.float16)
    return scales, minima, factors
