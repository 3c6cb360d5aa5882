"""Case: one run of a kernel on a device, and what must be true of its result."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.device import Device


@dataclass(frozen=True, slots=True)
class Case:
    """`run` raises AssertionError if the kernel's result is wrong.

    Attributes:
        kernels: names of the kernels that run.
        small: cheap enough to be tried against every mutant.
    """

    name: str
    kernels: frozenset[str]
    run: Callable[[Device], None]
    small: bool = True

    def __str__(self) -> str:
        return self.name


def assert_close(actual: Tensor, expected: NDArray[np.float64], tolerance: float) -> None:
    """Finite, and nowhere further off than `tolerance` times the typical size of the expected values."""
    assert tuple(actual.shape) == expected.shape, f"shape {tuple(actual.shape)}, expected {expected.shape}"
    numbers = actual.double().cpu().numpy()
    assert np.isfinite(numbers).all(), f"{(~np.isfinite(numbers)).sum()} of {numbers.size} numbers are not finite"
    if numbers.size:
        error = np.abs(numbers - expected).max() / np.sqrt(np.square(expected).mean() + 1e-30)
        assert error < tolerance, f"relative error {error:.2e}, tolerated {tolerance:.0e}"


def random_tensor(rng: np.random.Generator, *shape: int, dtype: torch.dtype, device: Device) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(device.torch_device, dtype)


def exact(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().cpu().numpy()
