"""Linear layers and embeddings in C++ against the same in float64, at sizes that fit no tile."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.quantized import QuantizedTensor
from harness.tensors import (
    TILED_CODE_ROWS,
    as_multiplied_with_codes,
    assert_close,
    quantized,
    randn,
    rounded_to_integers,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEW_ROWS = 4
WHOLE_NUMBERS = [(torch.int8, 127), (torch.int16, 32767)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (16, 256), (17, 257), (95, 33), (120, 576)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(cpu_kernels: CpuKernels, dtype: torch.dtype, outputs: int, inputs: int, with_bias: bool) -> None:
    weight, bias = randn(outputs, inputs).to(dtype), randn(outputs, seed=1) if with_bias else None
    linear = cpu_kernels.linear(weight, bias)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 48, 255, 256, 257, 600):
        x = randn(rows, inputs, seed=2)
        expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_close(linear(x), expected, 1e-5)
    assert linear(torch.empty(0, inputs)).shape == (0, outputs)


QUANTIZED = [
    pytest.param(bits, group, scales, minima, id=f"{bits}-bit-{group}-{str(scales)[6:]}{'-minima' * minima}")
    for bits, group, scales, minima in itertools.product(
        (4, 8), (16, 32, 128), (torch.float16, torch.float32), (False, True)
    )
    if bits == 8 or minima
]


@pytest.mark.parametrize("bits, group, scales, minima", QUANTIZED)
@pytest.mark.parametrize("outputs, inputs", [(1, 128), (120, 640)])
def test_linear_of_a_quantized_weight(
    cpu_kernels: CpuKernels, bits: int, group: int, scales: torch.dtype, minima: bool, outputs: int, inputs: int
) -> None:
    weight, bias = quantized(outputs, inputs, bits, group, scales, minima), randn(outputs, seed=3)
    linear = cpu_kernels.linear(weight, bias)
    for rows in (1, 2, 3, 4, 5, 13, 257):
        x = randn(rows, inputs, seed=4)
        assert_close(linear(x), functional.linear(x.double(), weight.dequantized().double(), bias.double()), 1e-5)


@pytest.mark.parametrize("outputs, inputs", [(1, 1), (17, 257), (95, 33), (40, 32), (33, 416), (120, 1536)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_in_bfloat16(dtype: torch.dtype, outputs: int, inputs: int, bfloat16_kernels: CpuKernels) -> None:
    """Exact products of rounded numbers; of few rows only the activations are rounded."""
    weight, bias = randn(outputs, inputs).to(dtype), randn(outputs, seed=1)
    linear = bfloat16_kernels.linear(weight, bias)
    for rows in (1, 4, 5, 13, 16, 17, 33, 48, 257, 300):
        x = randn(rows, inputs, seed=2)
        multiplied = (weight.bfloat16() if rows > FEW_ROWS else weight).double()
        assert_close(linear(x), functional.linear(x.bfloat16().double(), multiplied, bias.double()), 1e-5)


@pytest.mark.parametrize("bits, group, scales, minima", QUANTIZED)
def test_linear_of_a_quantized_weight_in_bfloat16(
    bits: int, group: int, scales: torch.dtype, minima: bool, bfloat16_kernels: CpuKernels
) -> None:
    """Exact products of what is rounded, the activations alone, whatever the number of rows."""
    weight, bias = quantized(120, 640, bits, group, scales, minima), randn(120, seed=3)
    linear, widened = bfloat16_kernels.linear(weight, bias), weight.dequantized().double()
    for rows in (1, 2, 3, 4, 5, 11, 12, 13, 257):
        x = randn(rows, 640, seed=4)
        assert_close(linear(x), functional.linear(x.bfloat16().double(), widened, bias.double()), 1e-5)


@pytest.mark.parametrize("dtype, largest", WHOLE_NUMBERS)
@pytest.mark.parametrize("outputs, inputs", [(17, 257), (95, 32), (120, 1536)])
def test_linear_in_whole_numbers(
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    largest: int,
    kernels_of_level: Callable[[torch.dtype | None], CpuKernels],
) -> None:
    """Plain weights are multiplied in float32."""
    weight = randn(outputs, inputs)
    linear = kernels_of_level(dtype).linear(weight, None)
    for rows in (1, 5, 48):
        x = randn(rows, inputs, seed=2)
        assert_close(linear(x), functional.linear(rounded_to_integers(x, 32, largest), weight.double()), 1e-5)


@pytest.mark.parametrize("dtype, largest", WHOLE_NUMBERS)
@pytest.mark.parametrize("bits, group, scales, minima", [*QUANTIZED, (8, 24, torch.float16, True)])
def test_linear_of_a_quantized_weight_in_whole_numbers(
    bits: int,
    group: int,
    scales: torch.dtype,
    minima: bool,
    dtype: torch.dtype,
    largest: int,
    kernels_of_level: Callable[[torch.dtype | None], CpuKernels],
) -> None:
    """Exact sums of codes, or where the processor has no instruction for them, of the same rounded numbers."""
    inputs = 5 * math.lcm(group, 32)
    weight, bias = quantized(120, inputs, bits, group, scales, minima), randn(120, seed=3)
    kernels = kernels_of_level(dtype)
    linear = kernels.linear(weight, bias)
    for rows in (1, 2, 3, 4, 5, 11, 12, 13, 96, 257):
        x = randn(rows, inputs, seed=4)
        x[0, :group] = 0
        entering, tolerance = as_multiplied_with_codes(x, group, largest, tiled=kernels.tiled)
        assert_close(linear(x), functional.linear(entering, weight.dequantized().double(), bias.double()), tolerance)


@pytest.mark.parametrize("dtype, largest", WHOLE_NUMBERS)
@pytest.mark.parametrize("gated", [False, True])
def test_many_rows_in_whole_numbers(
    gated: bool, dtype: torch.dtype, largest: int, kernels_of_level: Callable[[torch.dtype | None], CpuKernels]
) -> None:
    """Of every size that their tiles can have, in one block of rows and in two."""
    weight = quantized(120, 640, 4, 32, torch.float16, True)
    kernels = kernels_of_level(dtype)
    linear = kernels.gated_linear(weight, None) if gated else kernels.linear(weight, None)
    for rows in (7, 31, 32, 33, 41, 48, 264, 265, 300):
        x = randn(rows, 640, seed=4)
        entering, tolerance = as_multiplied_with_codes(x, 32, largest, tiled=kernels.tiled)
        expected = functional.linear(entering, weight.dequantized().double())
        if gated:
            gate, up = expected.chunk(2, dim=1)
            expected = functional.silu(gate) * up
        assert_close(linear(x), expected, tolerance)


@pytest.mark.parametrize("dtype, largest", WHOLE_NUMBERS)
@pytest.mark.parametrize("bits, code", [(4, 15), (8, -128), (8, 127)])
def test_sums_of_the_largest_whole_numbers_do_not_overflow(
    bits: int,
    code: int,
    dtype: torch.dtype,
    largest: int,
    kernels_of_level: Callable[[torch.dtype | None], CpuKernels],
) -> None:
    codes = torch.full((40, 512), code)
    stored = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8) if bits == 4 else codes.to(torch.int8)
    weight = QuantizedTensor(stored, torch.ones(40, 2), torch.zeros(40, 2))
    for x in (torch.ones(7, 512), -torch.ones(7, 512)):
        expected = functional.linear(rounded_to_integers(x, 256, largest), codes.double())
        assert_close(kernels_of_level(dtype).linear(weight, None)(x), expected, 1e-5)


@pytest.mark.parametrize("bits, group, scales", [(4, 32, torch.float16), (8, 16, torch.float32)])
def test_a_row_in_whole_numbers_does_not_depend_on_the_others(
    bits: int, group: int, scales: torch.dtype, kernels_of_level: Callable[[torch.dtype | None], CpuKernels]
) -> None:
    """The second form is that of K-quants of unlike kinds, stacked. By tiles of AMX a row is one of few, or one of many."""
    kernels = kernels_of_level(torch.int16)
    if not kernels.has_products:
        pytest.skip("multiplied in float32 here, few rows in another order than many")
    linear, x = kernels.linear(quantized(120, 1344, bits, group, scales, True), None), randn(301, 1344)
    together = linear(x)
    for rows in (slice(0, 1), slice(24, 37), slice(200, 264), slice(37, 300), slice(264, 265), slice(300, 301)):
        if kernels.tiled and rows.stop - rows.start < TILED_CODE_ROWS:
            continue
        assert torch.equal(linear(x[rows].contiguous()), together[rows])


@pytest.mark.parametrize("dtype, largest", WHOLE_NUMBERS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_seen_in_whole_numbers(
    value: float,
    dtype: torch.dtype,
    largest: int,
    kernels_of_level: Callable[[torch.dtype | None], CpuKernels],
) -> None:
    weights = (
        randn(40, 64),
        quantized(40, 64, 8, 32, torch.float16, False),
        quantized(40, 64, 4, 32, torch.float16, True),
    )
    for weight in weights:
        for rows in (1, 6, 100):
            x = randn(rows, 64)
            x[-1, 40] = value
            outputs = kernels_of_level(dtype).linear(weight, None)(x)
            assert not torch.isfinite(outputs[-1]).any()
            assert torch.isfinite(outputs[:-1]).all()


def test_what_is_not_finite_stays_so_in_bfloat16(bfloat16_kernels: CpuKernels) -> None:
    """And what is largest in float32 is rounded to infinity, as torch does it."""
    x = torch.tensor(
        [[float("inf")], [float("-inf")], [float("nan")], [3.4e38], [-3.0e38], [1e-40], [-0.0], [1.00390625]]
    )
    linear = bfloat16_kernels.linear(torch.ones(1, 1), None)
    torch.testing.assert_close(linear(x)[:5], x[:5].bfloat16().float(), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(linear(x)[5:], x[5:].bfloat16().float(), rtol=0, atol=1e-38)


@pytest.mark.parametrize("bits, group, scales, minima", QUANTIZED)
def test_gated_linear_of_a_quantized_weight(
    cpu_kernels: CpuKernels, bits: int, group: int, scales: torch.dtype, minima: bool
) -> None:
    weight = quantized(2 * 31, 384, bits, group, scales, minima)
    linear = cpu_kernels.gated_linear(weight, None)
    for rows in (1, 7):
        x = randn(rows, 384, seed=4) / 300
        gate, up = functional.linear(x.double(), weight.dequantized().double()).chunk(2, dim=-1)
        assert_close(linear(x), functional.silu(gate) * up, 3e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8, 257, 576])
def test_embedding(cpu_kernels: CpuKernels, dtype: torch.dtype, columns: int) -> None:
    weight, ids = randn(61, columns).to(dtype), torch.tensor([60, 0, 17, 60], dtype=torch.int32)
    embedding, linear = cpu_kernels.tied_embedding(weight)
    assert embedding(ids).equal(weight[ids].float())
    assert cpu_kernels.embedding(weight)(ids).equal(weight[ids].float())
    x = randn(3, columns, seed=1)
    assert_close(linear(x), functional.linear(x.double(), weight.double()), 1e-5)


@pytest.mark.parametrize("bits, group, scales, minima", QUANTIZED)
def test_embedding_of_a_quantized_weight(
    cpu_kernels: CpuKernels, bits: int, group: int, scales: torch.dtype, minima: bool
) -> None:
    weight, ids = quantized(61, 384, bits, group, scales, minima), torch.tensor([60, 0, 17], dtype=torch.int32)
    torch.testing.assert_close(cpu_kernels.embedding(weight)(ids), weight.dequantized()[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (8, 64), (9, 65), (31, 300)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gated_linear(cpu_kernels: CpuKernels, dtype: torch.dtype, outputs: int, inputs: int, with_bias: bool) -> None:
    weight, bias = randn(2 * outputs, inputs).to(dtype), randn(2 * outputs, seed=1) if with_bias else None
    linear = cpu_kernels.gated_linear(weight, bias)
    for rows in (1, 7, 97):
        x = randn(rows, inputs, seed=2)
        both = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        gate, up = both.chunk(2, dim=-1)
        assert_close(linear(x), functional.silu(gate) * up, 1e-5)


def test_the_gate_saturates_without_overflow(cpu_kernels: CpuKernels) -> None:
    linear = cpu_kernels.gated_linear(torch.tensor([[1.0], [1.0]]), None)
    x = torch.tensor([[-1e15], [-200.0], [-89.0], [0.0], [89.0], [200.0]])
    torch.testing.assert_close(linear(x), functional.silu(x) * x)
