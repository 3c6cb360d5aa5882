"""Emulated devices, whose kernels are compiled once into the user's cache."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evenhand_engine.model.cache import cache_dir
from evenhand_kernels.device import CompileError
from evenhand_kernels.emulation.build import runtime_library
from evenhand_kernels.emulation.device import EmulatedDevice

MakeDevice = Callable[..., EmulatedDevice]


@pytest.fixture(scope="session")
def emulation_dir() -> Path:
    directory = cache_dir() / "emulation"
    try:
        runtime_library(directory)
    except CompileError as error:
        pytest.skip(f"no C++ compiler: {error}")
    return directory


@pytest.fixture
def make_device(emulation_dir: Path) -> MakeDevice:
    def make(**options: object) -> EmulatedDevice:
        return EmulatedDevice(emulation_dir, **options)  # type: ignore[arg-type]

    return make
