"""Limits of this machine that hold whatever the software is: products in registers and reads of memory, on all cores at once."""

import ctypes
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

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ROUNDS, REPEATS = 3_000_000, 7
READ_BYTES = 256 << 20  # of each core: far beyond any cache


@dataclass(frozen=True)
class Limits:
    """FLOP in a second by the activations' dtype, for those that the processor multiplies itself; bytes in a second."""

    flops: dict[torch.dtype, float]
    bandwidth: float


def measured_limits() -> Limits:
    """The best of several short runs each. Needs a C++ compiler."""
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "limits.so")
        flags = ["-march=native", f"-I{library.SOURCE_DIR}"]
        subprocess.run(["g++", *library.FLAGS, *flags, str(source), "-o", path], check=True)
        code = ctypes.CDLL(path)
    code.limit_operations.restype, code.limit_operations.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_long]
    code.limit_read.restype, code.limit_read.argtypes = None, [ctypes.c_void_p, ctypes.c_long]
    memory = [torch.ones(READ_BYTES // 4) for _ in range(num_cores())]

    def operations(kind: int) -> float:
        return float(code.limit_operations(kind, ROUNDS))

    def read(part: torch.Tensor) -> float:
        code.limit_read(part.data_ptr(), len(part))
        return part.nbytes

    with ThreadPoolExecutor(len(memory)) as threads:

        def best(work: Callable[[], list[float]]) -> float:
            rates = []
            for _ in range(REPEATS):
                started_at = time.perf_counter()
                amount = sum(work())
                rates.append(amount / (time.perf_counter() - started_at))
            return max(rates)

        flops = {
            dtype: best(lambda: list(threads.map(operations, [kind] * len(memory))))  # noqa: B023
            for dtype, kind in KINDS.items()
            if code.limit_has(kind)
        }
        return Limits(flops, best(lambda: list(threads.map(read, memory))))
