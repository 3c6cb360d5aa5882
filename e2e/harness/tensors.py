"""Tensors that tests of the kernels make, and how far off a result may be."""

import torch
from torch import Tensor

from evenhand_kernels.quantized import QuantizedTensor


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
