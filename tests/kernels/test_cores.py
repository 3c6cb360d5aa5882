"""The kernels get a thread for each core that the process may use, and no more."""

import os
from pathlib import Path

import pytest
import torch

from evenhand_engine.model.cache import cache_dir
from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.cpu.kernels import CpuKernels


@pytest.mark.parametrize(
    "cpu_max, cores",
    [("max 100000", 6), ("200000 100000", 2), ("250000 100000", 3), ("5000 100000", 1), ("900000 100000", 6), ("", 6)],
)
def test_affinity_and_container_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    (tmp_path / "cpu.max").write_text(cpu_max)
    assert num_cores(tmp_path / "cpu.max") == cores
    assert num_cores(tmp_path / "missing") == 6


def test_what_torch_is_told_does_not_matter(cpu_kernels: CpuKernels) -> None:
    """Loading a model tells torch to use one thread; the next model in the process must not inherit that."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert CpuKernels(cache_dir() / "kernels").num_threads == num_cores()
    finally:
        torch.set_num_threads(before)
