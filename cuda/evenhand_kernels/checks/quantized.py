"""Cases of quantized_linear and dequantize, through their launchers, against products with the weights that the codes say."""

from functools import partial
from typing import Any

import numpy as np
import torch

from evenhand_kernels.checks.case import Case, assert_close, exact, random_tensor
from evenhand_kernels.cuda.quantized import MOST_ROWS, QuantizedLinears
from evenhand_kernels.device import Device
from evenhand_kernels.quantized import QuantizedTensor

TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.004}


def random_weight(
    rng: np.random.Generator, outputs: int, columns: int, *, bits: int, group: int, minima: bool
) -> QuantizedTensor:
    """Every code comes, scales differ by more than a factor of 100."""
    if bits == 4:
        codes = torch.from_numpy(rng.integers(0, 256, (outputs, columns // 2)).astype(np.uint8))
    else:
        codes = torch.from_numpy(rng.integers(-128, 128, (outputs, columns)).astype(np.int8))
    shape = (outputs, columns // group)
    scales = torch.from_numpy(np.exp(rng.uniform(-5, 0, shape)).astype(np.float16))
    low = torch.from_numpy(rng.normal(-8, 4, shape).astype(np.float32)) * scales if minima else None
    return QuantizedTensor(codes, scales, low)


def check_linear(
    device: Device,
    *,
    rows: int,
    outputs: int,
    columns: int,
    group: int,
    bits: int,
    dtype: torch.dtype = torch.bfloat16,
    biased: bool = False,
) -> None:
    rng = np.random.default_rng(rows * columns + outputs)
    weight = random_weight(rng, outputs, columns, bits=bits, group=group, minima=bits == 4 or biased)
    x = random_tensor(rng, rows, columns, dtype=dtype, device=device)
    bias = random_tensor(rng, outputs, dtype=dtype, device=device) if biased else None
    result = QuantizedLinears(device, dtype).linear(weight, bias)(x)
    expected = exact(x) @ exact(weight.dequantized()).T
    if bias is not None:
        expected += exact(bias)
    assert_close(result, expected, TOLERANCES[dtype])


def _cases() -> list[Case]:
    shapes: dict[str, dict[str, Any]] = {
        "one row, one run": {"rows": 1, "outputs": 8, "columns": 32, "group": 32},
        "outputs and columns that fill no block": {"rows": 3, "outputs": 40, "columns": 96, "group": 32},
        "a whole tile": {"rows": 16, "outputs": 64, "columns": 128, "group": 128},
        "one row more, biased": {"rows": 17, "outputs": 32, "columns": 416, "group": 32, "biased": True},
        "every warp has columns": {"rows": 33, "outputs": 8, "columns": 1152, "group": 64},
        "several blocks of rows": {"rows": 70, "outputs": 72, "columns": 160, "group": 32, "biased": True},
    }
    cases = []
    for bits in (4, 8):
        for name, shape in shapes.items():
            run = partial(check_linear, bits=bits, **shape)
            cases.append(Case(f"quantized_linear: {name}, {bits} bits", frozenset({"quantized_linear"}), run))
        run = partial(check_linear, bits=bits, dtype=torch.float16, **shapes["one row more, biased"])
        cases.append(Case(f"quantized_linear: float16, {bits} bits", frozenset({"quantized_linear"}), run))
        run = partial(check_linear, rows=MOST_ROWS + 1, outputs=24, columns=96, group=32, bits=bits, biased=True)
        cases.append(Case(f"dequantize: {bits} bits", frozenset({"dequantize"}), run))
    return cases


CASES = _cases()
