"""Tensors that tests of the kernels make, and how far off a result may be."""

import torch
from torch import Tensor

from evenhand_kernels.quantized import SUPER_BLOCK, QuantizedTensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Finite, and nowhere further off than `relative` times the typical size of the expected values."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected).abs().max() / expected.square().mean().sqrt()
    assert error < relative, f"relative error {error:.2e}"


def quantized(rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, with_minima: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows)
    if bits == 4:
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    else:
        codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales, minima = (randn(rows, columns // group, seed=seed).to(dtype) for seed in (1, 2))
    return QuantizedTensor(codes, scales, minima if with_minima else None)


def k_quant(rows: int, columns: int, bits: int) -> QuantizedTensor:
    """As in GGUF's Q4_K, Q5_K and Q6_K: of 6 bits scales have a sign and 16 columns, of less they and the minima have 6 bits."""
    generator = torch.Generator().manual_seed(bits)

    def integers(low: int, high: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (rows, columns), generator=generator, dtype=dtype)

    codes = integers(0, 256, columns // 8 * bits, torch.uint8)
    factors = randn(rows, columns // SUPER_BLOCK, 1 if bits == 6 else 2).half()
    if bits == 6:
        return QuantizedTensor(codes, integers(-128, 128, columns // 16, torch.int8), factors=factors)
    scales, minima = (integers(0, 64, columns // 32, torch.uint8) for _ in range(2))
    return QuantizedTensor(codes, scales, minima, factors)


def rounded_to_integers(x: Tensor, group: int, largest: int) -> Tensor:
    """Each run of `group` columns to whole multiples of its largest over `largest`, float64."""
    runs = []
    for first in range(0, x.shape[1], group):
        run = x[:, first : first + group]
        scale = run.abs().amax(1, keepdim=True) / largest
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        runs.append((run.double() * inverse).round() * scale)
    return torch.cat(runs, dim=1)


TILED_CODE_ROWS = 96
"""Rows from which on those of int16 are multiplied with codes by tiles of AMX (paired_tiles.h)."""


def as_multiplied_with_codes(x: Tensor, group: int, largest: int, *, tiled: bool) -> tuple[Tensor, float]:
    """What rows become in whole numbers up to `largest`, in float64, and how near to it a result is: by tiles many rows of
    int16 stay what they are, as the sum of two bfloat16 each."""
    if tiled and largest > 127 and len(x) >= TILED_CODE_ROWS:
        return x.double(), 2e-4
    return rounded_to_integers(x, group, largest), 1e-5
