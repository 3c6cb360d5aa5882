"""Every kernel against float64, thread by thread on the CPU, in shuffled orders of threads; and on a GPU where there is one."""

from collections.abc import Callable

import pytest
import torch

from evenhand_kernels.checks.case import Case
from evenhand_kernels.checks.mutants import CASES
from evenhand_kernels.cuda.device import CudaDevice
from evenhand_kernels.cuda.source import SOURCE_DIR
from evenhand_kernels.emulation.device import EmulatedDevice


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(make_device: Callable[..., EmulatedDevice], case: Case) -> None:
    for seed in (0, 1, 2) if case.small else (3,):
        case.run(make_device(seed=seed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_gpu(case: Case) -> None:
    device = CudaDevice()
    with device.stream():
        case.run(device)


def test_every_kernel_has_a_case() -> None:
    kernels = {path.stem for path in SOURCE_DIR.glob("*.cu")}
    assert kernels == set().union(*(case.kernels for case in CASES))
