"""The C++ kernels, compiled once into the user's cache."""

import shutil

import pytest

from evenhand_engine.model.cache import cache_dir
from evenhand_kernels.cpu.kernels import CpuKernels


@pytest.fixture(scope="session")
def cpu_kernels() -> CpuKernels:
    if not any(map(shutil.which, ("g++", "c++"))):
        pytest.skip("no C++ compiler")
    return CpuKernels(cache_dir() / "kernels", num_threads=3)
