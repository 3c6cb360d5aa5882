"""Limits of this machine that hold whatever the software is: products in registers and reads of memory, on all cores at once."""

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from evenhand_kernels.cpu import library
from evenhand_kernels.cpu.cores import num_cores

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int16: 3}
ROUNDS, REPEATS = 3_000_000, 7
READ_BYTES = 256 << 20  # of each core: far beyond any cache


@dataclass(frozen=True)
class Limits:
    """FLOP in a second by the activations' dtype, for those that the processor multiplies itself; bytes in a second."""

    flops: dict[torch.dtype, float]
    bandwidth: float


class Machine:
    """Measures this machine whenever it is asked: others may use it too, and memory is as slow as they make it just then."""

    def __init__(self) -> None:
        """Needs a C++ compiler."""
        source = Path(__file__).with_suffix(".cpp")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "limits.so")
            flags = ["-march=native", f"-I{library.SOURCE_DIR}"]
            subprocess.run(["g++", *library.FLAGS, *flags, str(source), "-o", path], check=True)
            self._code = ctypes.CDLL(path)
        self._code.limit_operations.restype = ctypes.c_double
        self._code.limit_operations.argtypes = [ctypes.c_int, ctypes.c_long]
        self._code.limit_read.restype, self._code.limit_read.argtypes = None, [ctypes.c_void_p, ctypes.c_long]
        self._kinds = {dtype: kind for dtype, kind in KINDS.items() if self._code.limit_has(kind)}
        self._measured: list[Limits] = []

    def measure(self) -> None:
        """What it can do at this moment: the best of several short runs each."""
        memory = [torch.ones(READ_BYTES // 4) for _ in range(num_cores())]
        with ThreadPoolExecutor(len(memory)) as threads:

            def best(part: Callable[[torch.Tensor], float]) -> float:
                rates = []
                for _ in range(REPEATS):
                    started_at = time.perf_counter()
                    amount = sum(threads.map(part, memory))
                    rates.append(amount / (time.perf_counter() - started_at))
                return max(rates)

            flops = {
                dtype: best(lambda _: float(self._code.limit_operations(kind, ROUNDS)))  # noqa: B023
                for dtype, kind in self._kinds.items()
            }
            self._measured.append(Limits(flops, best(self._read)))

    @property
    def limits(self) -> Limits:
        """Of all moments: the most of products, which no moment exceeds; of reads, whose rate others share, the median."""
        return Limits(
            {dtype: max(measured.flops[dtype] for measured in self._measured) for dtype in self._kinds},
            statistics.median(measured.bandwidth for measured in self._measured),
        )

    def _read(self, memory: torch.Tensor) -> float:
        self._code.limit_read(memory.data_ptr(), len(memory))
        return memory.nbytes
