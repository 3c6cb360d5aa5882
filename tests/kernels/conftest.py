"""The C++ kernels, compiled once into the user's cache."""

import pytest

from evenhand_engine.model.cache import cache_dir
from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.cpu.library import CompileError


@pytest.fixture(scope="session")
def cpu_kernels() -> CpuKernels:
    try:
        return CpuKernels(cache_dir() / "kernels", num_threads=3)
    except CompileError as error:
        pytest.skip(f"no C++ compiler: {error}")
