"""Device: what the GPU engine asks of a device. One implementation on CUDA, one that emulates it on the CPU.

Everything that only a GPU can show (streams, graphs, events, pinned memory, free memory) is behind this object, so that
all else that runs on a GPU also runs in tests. Work that is asked for goes to the device's one stream, in order, and is
done some time later; only `Event.wait`, and reading a tensor's values, wait for it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from evenhand_kernels.cuda.source import Variant


class DeviceError(Exception):
    """The device, its driver or a library for it is missing or unfit. The message says which and what to do."""


class CompileError(Exception):
    """A kernel does not compile. The message has the compiler's first error with file and line."""


class Launch(Protocol):
    """A compiled kernel."""

    def __call__(self, grid: int | tuple[int, ...], **arguments: Tensor | int | float | None) -> None:
        """Launch it over `grid` blocks, of up to three axes (a 0: nothing happens).

        The arguments are the fields of the kernel's `Arguments`, by name, all of them: tensors of this device for
        pointers, None for a null pointer. Their addresses are taken now: in a recorded graph, tensors must stay alive.
        """
        ...


class Event(Protocol):
    """A place in the order of the stream."""

    def wait(self) -> None:
        """Block this thread until the device has come to it."""
        ...

    def done(self) -> bool:
        """Whether it has."""
        ...


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again, with what its tensors hold by then."""
        ...


class Device(Protocol):
    """One device and its one stream."""

    @property
    def name(self) -> str:
        """For logs and results: 'NVIDIA H200', 'emulated'."""
        ...

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors live."""
        ...

    @property
    def architecture(self) -> str:
        """What kernels are compiled for: 'sm_90'."""
        ...

    @property
    def num_multiprocessors(self) -> int:
        """Multiprocessors; how many blocks of a kernel run on one is in the kernel's Variant."""
        ...

    def load(self, variant: Variant) -> Launch:
        """Compile, or take from the cache. The same variant gives the same Launch. Raises CompileError."""
        ...

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros on the host that the device copies from and to without waiting."""
        ...

    def stream(self) -> AbstractContextManager[None]:
        """Inside, torch's operations go to the device's stream too."""
        ...

    def record(self) -> Event:
        """An event at the end of what has been asked for so far."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` asks for. It must have run once before and read nothing back; what it allocates must be gone when it
        returns, since all recorded work shares the memory for that."""
        ...

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        """How long the device takes for what `work` asks for, so many times, once it has done so before; waits for it."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        ...
