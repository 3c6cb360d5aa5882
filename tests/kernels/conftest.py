"""The C++ kernels, compiled once into the user's cache."""

import functools
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch

from evenhand_engine.model.cache import cache_dir
from evenhand_kernels.cpu import library, native
from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.cpu.levels import LEVELS, usable_levels


@pytest.fixture(scope="session")
def cpu_kernels() -> CpuKernels:
    if not any(map(shutil.which, ("g++", "c++"))):
        pytest.skip("no C++ compiler")
    return CpuKernels(cache_dir() / "kernels", num_threads=3)


@pytest.fixture(scope="module", params=list(LEVELS))
def kernels_of_level(
    request: pytest.FixtureRequest, cpu_kernels: CpuKernels
) -> Iterator[Callable[[torch.dtype | None], CpuKernels]]:
    """Makes kernels, for a dtype of activations, that were compiled for one level of processor, if this one has all of it."""
    level = request.param
    if level not in usable_levels():
        pytest.skip(f"this processor is not of the level {level}")
    folder = cache_dir() / "kernels" / "levels"
    if not library.is_compiled_ahead(folder):
        library.compile_ahead(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "usable_levels", lambda: [level])
        patch.setattr(native, "load_library", functools.partial(library.load_library, shipped_dir=folder))
        yield lambda dtype: CpuKernels(folder, num_threads=3, activation_dtype=dtype)


@pytest.fixture(scope="module")
def bfloat16_kernels(kernels_of_level: Callable[[torch.dtype | None], CpuKernels]) -> CpuKernels:
    return kernels_of_level(torch.bfloat16)


@pytest.fixture(scope="module")
def int8_kernels(kernels_of_level: Callable[[torch.dtype | None], CpuKernels]) -> CpuKernels:
    return kernels_of_level(torch.int8)
