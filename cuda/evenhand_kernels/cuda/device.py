"""CudaDevice: the `Device` on an NVIDIA GPU. torch has streams, graphs, events and memory; CuPy compiles and launches."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.cuda.variants import supported_architectures
from evenhand_kernels.device import CompileError, DeviceError, Event, Graph, Launch

DEFAULT_SHARED_BYTES = 48 * 1024
"""A kernel must be told before it may be launched with more."""

ALL_SHARED = 100
"""Percent (cudaSharedmemCarveoutMaxShared)."""


def _why() -> str:
    """What torch says of a driver that is missing or too old, in brackets."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).partition('. ')[0]})"
    return ""


class CudaDevice:
    """Implements `Device`."""

    def __init__(self, index: int = 0) -> None:
        """Raises DeviceError if there is no GPU, driver or CuPy that fits."""
        try:
            self._cupy: Any = import_module("cupy")
        except ImportError as error:
            raise DeviceError(f"CuPy cannot be imported ({error}): install evenhand[gpu]") from error
        except OSError as error:  # it makes the folder of its cache as it is imported
            raise DeviceError(f"CuPy has no place for its cache ({error}): set CUPY_CACHE_DIR or HOME") from error
        if not torch.cuda.is_available():
            raise DeviceError(
                f"torch finds no CUDA device{_why()}: check nvidia-smi, and that torch was built with CUDA"
            )
        if index >= torch.cuda.device_count():
            raise DeviceError(f"there is no CUDA device {index}: {torch.cuda.device_count()} are visible")
        properties = torch.cuda.get_device_properties(index)
        self.name: str = properties.name
        self.architecture = f"sm_{properties.major}{properties.minor}"
        if self.architecture not in supported_architectures():
            supported = ", ".join(supported_architectures())
            raise DeviceError(f"{self.name} is {self.architecture}; the kernels are for {supported}")
        self.num_multiprocessors: int = properties.multi_processor_count
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        self._cupy.cuda.Device(index).use()  # CuPy has a runtime of its own
        self._stream = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]
        self._graph_memory = torch.cuda.graph_pool_handle()
        self._loaded: dict[Variant, CudaLaunch] = {}

    def load(self, variant: Variant) -> Launch:
        if variant not in self._loaded:
            self._loaded[variant] = CudaLaunch(self._cupy, variant)
        return self._loaded[variant]

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    @contextmanager
    def stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def record(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream())
        return _CudaEvent(event)

    def capture(self, work: Callable[[], None]) -> Graph:
        """All graphs share the memory that they take for what lives within one of them: they run one after the other.

        Calls of other threads, as of NCCL's, do not disturb it.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """By a graph, or what is measured is the time that Python takes for a launch."""

        def all_rounds() -> None:
            for _ in range(rounds):
                work()

        work()
        graph = self.capture(all_rounds)
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream()
        begin.record(stream)
        graph.replay()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.torch_device)


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class _CurrentStream:
    """All that CuPy asks of a stream is its handle; torch's current one may change between launches."""

    @property
    def ptr(self) -> int:
        return torch.cuda.current_stream().cuda_stream


class CudaLaunch:
    """Implements `Launch`. All arguments are one structure, which CuPy passes by value."""

    def __init__(self, cupy: Any, variant: Variant) -> None:
        """Compiles at once, and not at the first launch, which may be while a graph is recorded. Raises CompileError, DeviceError."""
        try:
            module = cupy.RawModule(code=variant.text, options=compiler_options(variant))
            self._kernel = module.get_function(variant.kernel)
            self._kernel.compile()
        except cupy.cuda.compiler.CompileException as error:
            raise CompileError(f"{variant}: {first_error(str(error))}") from error
        except cupy.cuda.driver.CUDADriverError as error:
            raise DeviceError(
                f"the driver does not load {variant} ({error}): update it, or install an older CuPy"
            ) from error
        if variant.shared_bytes > DEFAULT_SHARED_BYTES:
            self._kernel.max_dynamic_shared_size_bytes = variant.shared_bytes
            # of what a multiprocessor divides between L1 and shared memory: or it might have room for fewer blocks than are planned
            self._kernel.preferred_shared_memory_carveout = ALL_SHARED
        self._values = np.zeros(1, variant.argument_dtype)
        self._argument = (cupy.cuda.function.CNumpyArray(self._values),)
        self._pointers = tuple(field.name for field in variant.fields if field.is_pointer)
        self._numbers = tuple(field.name for field in variant.fields if not field.is_pointer)
        self._block, self._shared_bytes = (variant.num_threads, 1, 1), variant.shared_bytes
        self._stream = _CurrentStream()

    def __call__(self, grid: int | tuple[int, ...], **arguments: Tensor | int | float | None) -> None:
        axes = (grid,) if isinstance(grid, int) else grid
        if 0 in axes:
            return
        values = self._values[0]
        for name in self._pointers:
            tensor = arguments[name]
            values[name] = tensor.data_ptr() if isinstance(tensor, Tensor) else 0
        for name in self._numbers:
            values[name] = arguments[name]
        self._kernel((*axes, 1, 1)[:3], self._block, self._argument, shared_mem=self._shared_bytes, stream=self._stream)


def compiler_options(variant: Variant) -> tuple[str, ...]:
    """What CuPy is given for NVRTC. It adds the device's architecture, as -arch, and others that `checks/compiled.py` has."""
    options = ("-std=c++17", *variant.definitions)
    if variant.architecture is not None:  # NVRTC follows the long name of the option, wherever it stands
        options += (f"--gpu-architecture={variant.architecture}",)
    return options


def first_error(log: str) -> str:
    """The first error in a log of NVRTC, with file and line."""
    match = re.search(r"^(?:.*/)?([\w.]+\(\d+\): (?:catastrophic )?error.*)$", log, re.MULTILINE)
    return match[1] if match else log[:400]
