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
    rng: np.random.Generator, outputs: int, columns: int, *, bits: int, group: int, minima: bool, fp8: bool
) -> QuantizedTensor:
    """Every code comes, scales differ by more than a factor of 100."""
    if fp8:
        finite = [code for code in range(256) if code & 0x7F != 0x7F]
        codes = torch.from_numpy(rng.choice(finite, (outputs, columns)).astype(np.uint8)).view(torch.float8_e4m3fn)
    elif bits == 4:
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
    fp8: bool = False,
) -> None:
    rng = np.random.default_rng(rows * columns + outputs)
    minima = not fp8 and (bits == 4 or biased)
    weight = random_weight(rng, outputs, columns, bits=bits, group=group, minima=minima, fp8=fp8)
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
    forms: dict[str, dict[str, Any]] = {"4 bits": {"bits": 4}, "8 bits": {"bits": 8}, "fp8": {"bits": 8, "fp8": True}}
    for form, code in forms.items():
        for name, shape in shapes.items():
            run = partial(check_linear, **code, **shape)
            cases.append(Case(f"quantized_linear: {name}, {form}", frozenset({"quantized_linear"}), run))
        run = partial(check_linear, **code, dtype=torch.float16, **shapes["one row more, biased"])
        cases.append(Case(f"quantized_linear: float16, {form}", frozenset({"quantized_linear"}), run))
        run = partial(check_linear, rows=MOST_ROWS + 1, outputs=24, columns=96, group=32, biased=True, **code)
        cases.append(Case(f"dequantize: {form}", frozenset({"dequantize"}), run))
    return cases


CASES = _cases()
