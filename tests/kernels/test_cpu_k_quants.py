"""K-quants in C++ against the same weights in float64, at sizes that fit no tile, and what they take in memory."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.cpu.native import WeightStructure
from harness.tensors import as_multiplied_with_codes, assert_close, k_quant, randn

pytestmark = pytest.mark.parametrize("bits", [4, 5, 6])
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 257)


@pytest.mark.parametrize("outputs, inputs", [(1, 256), (17, 512), (95, 1280), (120, 768)])
def test_linear(cpu_kernels: CpuKernels, bits: int, outputs: int, inputs: int) -> None:
    weight, bias = k_quant(outputs, inputs, bits), randn(outputs, seed=3)
    linear = cpu_kernels.linear(weight, bias)
    for rows in ROWS:
        x = randn(rows, inputs, seed=4)
        assert_close(linear(x), functional.linear(x.double(), weight.dequantized().double(), bias.double()), 1e-5)


def test_linear_in_bfloat16(bits: int, bfloat16_kernels: CpuKernels) -> None:
    """Exact products of what is rounded, the activations alone."""
    weight, bias = k_quant(120, 768, bits), randn(120, seed=3)
    linear, widened = bfloat16_kernels.linear(weight, bias), weight.dequantized().double()
    for rows in ROWS:
        x = randn(rows, 768, seed=4)
        assert_close(linear(x), functional.linear(x.bfloat16().double(), widened, bias.double()), 1e-5)


@pytest.mark.parametrize("dtype, largest", [(torch.int8, 127), (torch.int16, 32767)])
def test_linear_in_whole_numbers(
    bits: int, dtype: torch.dtype, largest: int, kernels_of_level: Callable[[torch.dtype | None], CpuKernels]
) -> None:
    weight, bias = k_quant(120, 768, bits), randn(120, seed=3)
    kernels = kernels_of_level(dtype)
    linear, widened = kernels.linear(weight, bias), weight.dequantized().double()
    for rows in ROWS:
        x = randn(rows, 768, seed=4)
        entering, tolerance = as_multiplied_with_codes(x, weight.group, largest, tiled=kernels.tiled)
        assert_close(linear(x), functional.linear(entering, widened, bias.double()), tolerance)


def test_gated_linear(cpu_kernels: CpuKernels, bits: int) -> None:
    weight = k_quant(2 * 31, 512, bits)
    linear = cpu_kernels.gated_linear(weight, None)
    for rows in (1, 7):
        x = randn(rows, 512, seed=4) / 3000
        gate, up = functional.linear(x.double(), weight.dequantized().double()).chunk(2, dim=-1)
        assert_close(linear(x), functional.silu(gate) * up, 3e-5)


def test_embedding(cpu_kernels: CpuKernels, bits: int) -> None:
    weight, ids = k_quant(61, 1024, bits), torch.tensor([60, 0, 17, 60], dtype=torch.int32)
    embedding, linear = cpu_kernels.tied_embedding(weight)
    assert_close(embedding(ids), weight.dequantized()[ids].double(), 1e-6)
    x = randn(3, 1024, seed=1)
    assert_close(linear(x), functional.linear(x.double(), weight.dequantized().double()), 1e-5)


def test_memory_of_a_weight_in_bits(cpu_kernels: CpuKernels, bits: int) -> None:
    """In the file 4.5, 5.5 and 6.5625: scales and minima have bytes of their own here."""
    structure = cpu_kernels.linear(k_quant(64, 512, bits), None).structure
    num_bytes = cpu_kernels._native.library.evenhand_packed_bytes(ctypes.byref(structure))
    assert isinstance(structure, WeightStructure)
    assert num_bytes * 8 / (64 * 512) == {4: 4.625, 5: 5.625, 6: 6.5625}[bits]
