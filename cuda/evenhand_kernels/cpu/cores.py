"""How many threads are worth having."""

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Quota and period in microseconds of the control group (version 2) that a container sees as its own."""


def num_cores(cpu_max: Path = CPU_MAX) -> int:
    """Cores that this process may use: those of its affinity, and no more than its container's CPU limit, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
