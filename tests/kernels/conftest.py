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

TILES = "+tiles"
"""Behind the name of a level: many rows are multiplied by tiles of AMX."""


def needs_tiles(kernels: CpuKernels) -> CpuKernels:
    if not kernels.tiled:
        pytest.skip("this processor has no tiles of AMX, or its system does not let them be used")
    return kernels


@pytest.fixture(scope="session")
def cpu_kernels() -> CpuKernels:
    if not any(map(shutil.which, ("g++", "c++"))):
        pytest.skip("no C++ compiler")
    return CpuKernels(cache_dir() / "kernels", num_threads=3, tiled=False)


@pytest.fixture(scope="session", params=["", TILES], ids=["vectors", "tiles"])
def attending_kernels(request: pytest.FixtureRequest, cpu_kernels: CpuKernels) -> CpuKernels:
    return needs_tiles(CpuKernels(cache_dir() / "kernels", num_threads=3)) if request.param else cpu_kernels


@pytest.fixture(scope="module", params=[*LEVELS, next(iter(LEVELS)) + TILES])
def kernels_of_level(
    request: pytest.FixtureRequest, cpu_kernels: CpuKernels
) -> Iterator[Callable[[torch.dtype | None], CpuKernels]]:
    """Makes kernels, for a dtype of activations, that were compiled for one level of processor, if this one has all of it."""
    level, tiled = request.param.removesuffix(TILES), request.param.endswith(TILES)
    if level not in usable_levels():
        pytest.skip(f"this processor is not of the level {level}")
    folder = cache_dir() / "kernels" / "levels"
    if not library.is_compiled_ahead(folder):
        library.compile_ahead(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "usable_levels", lambda: [level])
        patch.setattr(native, "load_library", functools.partial(library.load_library, shipped_dir=folder))
        check = needs_tiles if tiled else lambda kernels: kernels
        yield lambda dtype: check(CpuKernels(folder, num_threads=3, activation_dtype=dtype, tiled=tiled))


@pytest.fixture(scope="module")
def bfloat16_kernels(kernels_of_level: Callable[[torch.dtype | None], CpuKernels]) -> CpuKernels:
    return kernels_of_level(torch.bfloat16)


@pytest.fixture(scope="module")
def int8_kernels(kernels_of_level: Callable[[torch.dtype | None], CpuKernels]) -> CpuKernels:
    return kernels_of_level(torch.int8)
