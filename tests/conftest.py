"""Shared by all tests: what they assert is what code does, never how fast a machine that others use too does it."""

import shutil
from typing import TYPE_CHECKING

import hypothesis
import pytest
from hypothesis.internal.conjecture import providers

if TYPE_CHECKING:
    from evenhand_kernels.kernels import Kernels

# The same examples on every machine; `make soak` looks for others. Hypothesis would also try values that it finds in our modules,
# in those that happen to be imported by then.
providers._get_local_constants = providers.Constants
_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("evenhand", deadline=None, derandomize=True, suppress_health_check=_SLOW)
hypothesis.settings.register_profile("soak", deadline=None, suppress_health_check=_SLOW)
hypothesis.settings.load_profile("evenhand")


@pytest.fixture(scope="session", params=["torch", "cpu"])
def kernels(request: pytest.FixtureRequest) -> "Kernels":
    """Each implementation that runs without a GPU."""
    from evenhand_engine.model.cache import cache_dir
    from evenhand_kernels.cpu.kernels import CpuKernels
    from evenhand_kernels.reference import ReferenceKernels

    if request.param == "torch":
        return ReferenceKernels()
    if not any(map(shutil.which, ("g++", "c++"))):
        pytest.skip("no C++ compiler")
    return CpuKernels(cache_dir() / "kernels", num_threads=3)
