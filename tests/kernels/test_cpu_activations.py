"""To what CpuKernels rounds what enters a linear layer where nobody says so, and what it tells of that."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.cpu.levels import CPUINFO
from harness.tensors import assert_close, quantized, randn, rounded_to_integers


def test_activations_are_by_choice_what_the_processor_multiplies_fast(
    kernels_of_level: Callable[[torch.dtype | None], CpuKernels], request: pytest.FixtureRequest
) -> None:
    """Of those beside codes the faster one: Intel's processors are slow with pairs of bfloat16."""
    chosen = kernels_of_level(None).activation_dtype
    assert kernels_of_level(chosen).has_products
    level = request.node.callspec.params["kernels_of_level"]
    is_slow = "GenuineIntel" in CPUINFO.read_text(encoding="utf-8")
    assert chosen is (torch.bfloat16 if "bf16" in level and not is_slow else torch.int16)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.int8, torch.int16])
def test_as_what_rows_are_multiplied_is_told(
    given: torch.dtype, kernels_of_level: Callable[[torch.dtype | None], CpuKernels]
) -> None:
    """Only codes are multiplied as whole numbers, and nothing as what the processor has no instruction for."""
    kernels, chosen = kernels_of_level(given), kernels_of_level(None)
    expected = given if kernels.has_products else torch.float32
    assert kernels.multiplied_as(None) is expected
    assert kernels.multiplied_as(torch.bfloat16) is (expected if given is torch.bfloat16 else torch.float32)
    assert chosen.multiplied_as(None) is chosen.activation_dtype
    is_fast = chosen.tiled or chosen.activation_dtype is torch.bfloat16
    assert chosen.multiplied_as(torch.bfloat16) is (torch.bfloat16 if is_fast else torch.float32)
    for plain in (torch.float32, torch.float16):
        assert chosen.multiplied_as(plain) is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_chosen_loses_nothing_of_plain_weights(
    dtype: torch.dtype, kernels_of_level: Callable[[torch.dtype | None], CpuKernels]
) -> None:
    """Beside float16 and float32 activations stay float32, beside bfloat16 and codes they are at least as precise as those."""
    chosen = kernels_of_level(None)
    x, bias = randn(13, 257, seed=2), randn(40, seed=1)
    weight = randn(40, 257).to(dtype)
    entering = x.to(chosen.multiplied_as(dtype))
    expected = functional.linear(entering.double(), weight.double(), bias.double())
    for rows in (slice(0, 1), slice(0, 13)):
        assert_close(chosen.linear(weight, bias)(x[rows].contiguous()), expected[rows], 1e-5)
    coded = quantized(40, 256, 4, 32, torch.float16, True)
    entering = (
        rounded_to_integers(x[:, :256], 32, 32767)
        if chosen.activation_dtype is torch.int16
        else x[:, :256].to(chosen.activation_dtype).double()
    )
    expected = functional.linear(entering, coded.dequantized().double())
    assert_close(chosen.linear(coded, None)(x[:, :256].contiguous()), expected, 1e-5)
