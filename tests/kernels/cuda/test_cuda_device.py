"""The CUDA device without a GPU: what is missing is said in one line, and what a launch hands to CuPy is what the kernel reads."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.device import CudaDevice, CudaLaunch
from evenhand_kernels.device import CompileError, DeviceError

SILU_MUL = variants.silu_mul(torch.bfloat16)


class CompileException(Exception):
    """As CuPy's."""


class Kernel:
    """Remembers its launches; `log`: why it does not compile."""

    def __init__(self, log: str = "") -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.max_dynamic_shared_size_bytes = 0
        self._log = log

    def compile(self) -> None:
        if self._log:
            raise CompileException(self._log)

    def __call__(self, grid: Any, block: Any, arguments: Any, *, shared_mem: int, stream: Any) -> None:
        self.launches.append((grid, block, arguments[0].copy(), shared_mem))


def fake_cupy(kernel: Kernel) -> Any:
    function = SimpleNamespace(CNumpyArray=lambda array: array)
    module = SimpleNamespace(get_function=lambda name: kernel)
    return SimpleNamespace(
        RawModule=lambda code, options: module,
        cuda=SimpleNamespace(compiler=SimpleNamespace(CompileException=CompileException), function=function),
    )


def test_a_variant_for_one_architecture_names_it() -> None:
    """Beside the one that CuPy adds, which lacks what only this architecture has."""
    chosen: list[tuple[str, ...]] = []
    cupy = fake_cupy(Kernel())
    make = cupy.RawModule
    cupy.RawModule = lambda code, options: chosen.append(options) or make(code, options)
    for wgmma in (False, True):
        choice = variants.AttentionChoice(wgmma=wgmma)
        CudaLaunch(cupy, variants.attention(torch.bfloat16, torch.bfloat16, 128, 16, "sm_90", choice=choice))
    assert ["--gpu-architecture=sm_90a" in options for options in chosen] == [False, True]


def test_a_machine_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"^CuPy cannot be imported \(.*\): install evenhand\[gpu\]$"):
        CudaDevice()


def test_cupy_without_a_place_for_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no home: it makes the folder when it is imported."""

    def fail(_: str) -> None:
        raise PermissionError(13, "Permission denied", "/.cupy")

    monkeypatch.setattr("evenhand_kernels.cuda.device.import_module", fail)
    with pytest.raises(DeviceError, match=r"/\.cupy.*set CUPY_CACHE_DIR or HOME$"):
        CudaDevice()


def old_driver() -> None:
    raise RuntimeError(
        "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by downloading one."
    )


@pytest.mark.parametrize(
    ("is_available", "index", "capability", "message"),
    [
        (
            False,
            0,
            (9, 0),
            "torch finds no CUDA device (The NVIDIA driver on your system is too old (found version 12040)): check nvidia-smi, "
            "and that torch was built with CUDA",
        ),
        (True, 2, (9, 0), "there is no CUDA device 2: 2 are visible"),
        (True, 1, (7, 5), f"Tesla T4 is sm_75; the kernels are for {', '.join(variants.supported_architectures())}"),
    ],
)
def test_a_gpu_that_is_missing_or_unfit(
    monkeypatch: pytest.MonkeyPatch, is_available: bool, index: int, capability: tuple[int, int], message: str
) -> None:
    properties = SimpleNamespace(name="Tesla T4", major=capability[0], minor=capability[1], multi_processor_count=40)
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    with pytest.raises(DeviceError) as caught:
        CudaDevice(index)
    assert str(caught.value) == message


def test_a_kernel_that_does_not_compile_is_told_by_its_first_error() -> None:
    log = (
        "/tmp/tmp1/silu_mul.cu(3): warning #177-D: declared but never referenced\n\n"
        '/tmp/tmp1/silu_mul.cu(21): error: identifier "x" is undefined\n\n'
        "/tmp/tmp1/silu_mul.cu(40): error: expected a ;\n"
    )
    with pytest.raises(CompileError, match=r'silu_mul\.cu\(21\): error: identifier "x" is undefined$'):
        CudaLaunch(fake_cupy(Kernel(log)), SILU_MUL)


def test_a_launch_hands_over_addresses_and_numbers() -> None:
    kernel = Kernel()
    launch = CudaLaunch(fake_cupy(kernel), SILU_MUL)
    gate_up, output = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    launch(3, gate_up=gate_up, output=output, num_rows=2, size=4)
    launch((5, 7), gate_up=gate_up, output=None, num_rows=1, size=4)
    launch((5, 0, 2), gate_up=gate_up, output=output, num_rows=2, size=4)
    (grid, block, first, shared), (other_grid, _, second, _) = kernel.launches
    assert (grid, block, shared) == ((3, 1, 1), (SILU_MUL.num_threads, 1, 1), SILU_MUL.shared_bytes)
    assert other_grid == (5, 7, 1)
    values: np.void = first[0]
    assert (values["gate_up"], values["output"]) == (gate_up.data_ptr(), output.data_ptr())
    assert (values["num_rows"], values["size"]) == (2, 4)
    assert second[0]["output"] == 0, "a null pointer, and not what the launch before had"
