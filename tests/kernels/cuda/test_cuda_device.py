"""The CUDA device without a GPU: what is missing is said in one line, and what a launch hands to CuPy is what the kernel reads."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.device import CudaDevice, CudaLaunch
from evenhand_kernels.device import CompileError, DeviceError

SILU_MUL = variants.silu_mul(torch.bfloat16)


class CompileException(Exception):
    """As CuPy's."""


class CUDADriverError(RuntimeError):
    """As CuPy's."""


class Kernel:
    """Remembers its launches; `log`: why it does not compile; `driver_error`: why it is not loaded."""

    def __init__(self, log: str = "", driver_error: str = "") -> None:
        self._driver_error = driver_error
        self.launches: list[tuple[Any, ...]] = []
        self.max_dynamic_shared_size_bytes = 0
        self.preferred_shared_memory_carveout = -1
        self._log = log

    def compile(self) -> None:
        if self._log:
            raise CompileException(self._log)
        if self._driver_error:
            raise CUDADriverError(self._driver_error)

    def __call__(self, grid: Any, block: Any, arguments: Any, *, shared_mem: int, stream: Any) -> None:
        self.launches.append((grid, block, arguments[0].copy(), shared_mem))


def fake_cupy(kernel: Kernel) -> Any:
    function = SimpleNamespace(CNumpyArray=lambda array: array)
    module = SimpleNamespace(get_function=lambda name: kernel)
    return SimpleNamespace(
        RawModule=lambda code, options: module,
        cuda=SimpleNamespace(
            compiler=SimpleNamespace(CompileException=CompileException),
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            function=function,
        ),
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


def test_a_kernel_that_the_driver_does_not_load_is_told_in_one_line() -> None:
    error = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the provided PTX was compiled with an unsupported toolchain."
    with pytest.raises(
        DeviceError, match=r"^the driver does not load silu_mul BF16 \(CUDA_ERROR_UNSUPPORTED.*: update it"
    ):
        CudaLaunch(fake_cupy(Kernel(driver_error=error)), SILU_MUL)


def test_what_is_used_of_cupy_is_there() -> None:
    """Without a device nothing of it runs; but names can be looked up."""
    cupy = pytest.importorskip("cupy")
    assert issubclass(cupy.cuda.driver.CUDADriverError, Exception)
    assert issubclass(cupy.cuda.compiler.CompileException, Exception)
    assert isinstance(cupy.cuda.function.CNumpyArray(np.zeros(1, SILU_MUL.argument_dtype)), cupy.cuda.function.CPointer)
    assert hasattr(cupy.RawKernel, "max_dynamic_shared_size_bytes") and hasattr(cupy.cuda.Device, "use")
    assert hasattr(cupy.RawKernel, "preferred_shared_memory_carveout")


def test_a_kernel_is_told_of_the_shared_memory_that_it_is_launched_with() -> None:
    kernel = Kernel()
    CudaLaunch(fake_cupy(kernel), SILU_MUL)
    assert (kernel.max_dynamic_shared_size_bytes, kernel.preferred_shared_memory_carveout) == (0, -1), "the defaults do"
    large = variants.attention(torch.bfloat16, torch.bfloat16, 128, 16, "sm_90")
    CudaLaunch(fake_cupy(kernel), large)
    assert (kernel.max_dynamic_shared_size_bytes, kernel.preferred_shared_memory_carveout) == (large.shared_bytes, 100)


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


def test_cupy_asks_a_stream_for_its_handle_alone() -> None:
    """Before it launches anything: torch's current stream is enough for it."""
    function = pytest.importorskip("cupy.cuda.function")

    class Stream:
        @property
        def ptr(self) -> int:
            raise LookupError("the handle")

    kernel = function.Function.__new__(function.Function)
    with pytest.raises(LookupError, match="the handle"):
        kernel((1, 1, 1), (32, 1, 1), (), shared_mem=0, stream=Stream())


def test_all_recorded_graphs_share_memory_and_a_measurement_is_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of some thirty would keep its own; and of launches one by one Python's time would be measured."""
    done: list[Any] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            return 2000.0

    asked = inspect.signature(torch.cuda.graph)

    @contextmanager
    def recording(*args: Any, **options: Any) -> Iterator[None]:
        done.append(asked.bind(*args, **options).arguments)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "graph", recording)
    device = CudaDevice.__new__(CudaDevice)
    device._graph_memory, device._stream = (0, 1), cast(torch.cuda.Stream, "stream")
    device.capture(lambda: done.append("first"))
    assert device.seconds(lambda: done.append("work"), 3) == 2.0
    options = [each for each in done if isinstance(each, dict)]
    assert len(options) == 2 and all(each["pool"] == (0, 1) and each["stream"] == "stream" for each in options)
    after = done[done.index(options[1]) + 1 :]
    assert after == ["work"] * 3 + ["replay", "record", "replay", "record", "wait"]
