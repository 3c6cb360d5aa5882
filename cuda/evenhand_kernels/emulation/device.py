"""EmulatedDevice: the `Device` of tests. Tensors are on the CPU, kernels run in the emulation, at once."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.cuda.source import SOURCE_DIR, Variant
from evenhand_kernels.device import Event, Graph, Launch
from evenhand_kernels.emulation.build import kernel_library, source_line

ERROR_BYTES = 1024
Value = Tensor | int | float | None


class EmulationError(Exception):
    """A kernel did what it must not. The message names kernel, block, thread and what, and the line of the source."""


class EmulatedDevice:
    """Implements `Device`."""

    name = "emulated"
    torch_device = torch.device("cpu")
    architecture = "sm_90"

    def __init__(
        self,
        cache_dir: Path,
        *,
        checked: bool = True,
        seed: int = 0,
        num_multiprocessors: int = 4,
        source_dir: Path = SOURCE_DIR,
    ) -> None:
        """Libraries are compiled into `cache_dir`.

        Args:
            checked: watch every access for bounds, races and uninitialised memory: several times slower.
            seed: of the order in which threads run; 0: in turn.
            num_multiprocessors: what plans take for the size of the device.
            source_dir: where the kernels are; for tests of changed ones.
        """
        self.seed = seed
        self.num_multiprocessors = num_multiprocessors
        self._cache_dir, self._checked, self._source_dir = cache_dir, checked, source_dir
        self._loaded: dict[Variant, EmulatedLaunch] = {}

    def load(self, variant: Variant) -> Launch:
        if variant not in self._loaded:
            local = replace(variant, directory=self._source_dir)
            library = kernel_library(self._cache_dir, local, checked=self._checked)
            self._loaded[variant] = EmulatedLaunch(self, local, library, checked=self._checked)
        return self._loaded[variant]

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield

    def record(self) -> Event:
        return _Now()

    def capture(self, work: Callable[[], None]) -> Graph:
        return _Repeat(work)

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """Always the same, after one round: how fast the emulation is tells nothing."""
        work()
        return 1.0

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30


class _Now:
    """An event of a device that does everything at once."""

    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


@dataclass(frozen=True)
class _Repeat:
    """A graph that asks for its work again. What it does not show: work that depends on anything but its tensors."""

    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


class EmulatedLaunch:
    """Implements `Launch`. Kernels may touch the whole tensors that they are given, and nothing else."""

    def __init__(self, device: EmulatedDevice, variant: Variant, library: Path, *, checked: bool) -> None:
        self._device, self._variant, self._path, self._checked = device, variant, library, checked
        self._library = ctypes.CDLL(str(library))
        self._dtype = variant.argument_dtype
        assert self._library.arguments_bytes() == self._dtype.itemsize, (
            f"{variant.kernel}: the layouts of Arguments differ"
        )
        self._library.emulate.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._error = ctypes.create_string_buffer(ERROR_BYTES)

    def __call__(self, grid: int | tuple[int, ...], **arguments: Value) -> None:
        axes = (grid,) if isinstance(grid, int) else grid
        if 0 in axes:
            return
        values = torch.zeros(self._dtype.itemsize, dtype=torch.uint8)
        structure = values.numpy().view(self._dtype)[0]
        buffers: dict[int, _Buffer] = {}
        for field in self._variant.fields:
            value = arguments.pop(field.name)
            if not field.is_pointer:
                structure[field.name] = value
            elif isinstance(value, Tensor):
                structure[field.name] = value.data_ptr()
                _add(buffers, field.name, value, writable=not field.is_const)
        if arguments:
            raise TypeError(f"{self._variant.kernel} has no argument {', '.join(arguments)}")
        launch = _Launch(
            kernel=self._variant.kernel.encode(),
            buffers=(_Buffer * len(buffers))(*buffers.values()),
            num_buffers=len(buffers),
            seed=self._device.seed,
            error=ctypes.addressof(self._error),
            grid=(*axes, 1, 1)[:3],
            num_threads=self._variant.num_threads,
            shared_bytes=self._variant.shared_bytes,
            checked=self._checked,
            num_os_threads=num_cores(),
        )
        if self._library.emulate(ctypes.addressof(launch), values.data_ptr()):
            line = source_line(self._path, launch.site)
            raise EmulationError(f"{line}: {self._error.value.decode()}" if line else self._error.value.decode())


def _add(buffers: dict[int, "_Buffer"], name: str, tensor: Tensor, *, writable: bool) -> None:
    """One entry for all arguments that begin at one address."""
    address, size = tensor.data_ptr(), _extent(tensor)
    known = buffers.get(address)
    if known is None:
        buffers[address] = _Buffer(name=name.encode(), begin=address, bytes=size, writable=writable)
    else:
        known.bytes, known.writable = max(known.bytes, size), known.writable or writable


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


class _Buffer(ctypes.Structure):
    """`Buffer` of launch.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("begin", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class _Launch(ctypes.Structure):
    """`Launch` of launch.h."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("seed", ctypes.c_uint64),
        ("site", ctypes.c_uint64),
        ("error", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("num_threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("num_buffers", ctypes.c_uint32),
        ("checked", ctypes.c_int32),
        ("num_os_threads", ctypes.c_uint32),
    )
