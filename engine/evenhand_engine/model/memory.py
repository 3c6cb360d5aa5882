"""How much memory this process may still take, so that a model that cannot fit is refused before it is loaded."""

from pathlib import Path

from evenhand_engine.errors import StartupError

RESERVE_BYTES = 256 << 20
"""For activations, logits and everything else that is not weights or KV cache."""

CGROUP_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files below /sys/fs/cgroup with a container's limit and use: version 2, then version 1."""


def require_memory(*, weights: int, kv_cache: int) -> None:
    """Raises StartupError unless that many bytes are available."""
    available = available_bytes()
    if available is not None and weights + kv_cache + RESERVE_BYTES > available:
        raise StartupError(
            f"too little memory: the weights need {_gib(weights)}, the KV cache {_gib(kv_cache)} and the rest "
            f"{_gib(RESERVE_BYTES)}, but {_gib(available)} are available: choose a smaller KV cache, a 16-bit dtype "
            "or a smaller model"
        )


def available_bytes() -> int | None:
    """What this process can still allocate without swapping, inside its container's limit; None: not known."""
    limits = [_meminfo_available(Path("/proc/meminfo"))]
    for limit, usage in CGROUP_LIMITS:
        limits.append(_cgroup_available(Path("/sys/fs/cgroup") / limit, Path("/sys/fs/cgroup") / usage))
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo_available(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_available(limit: Path, usage: Path) -> int | None:
    try:
        return int(limit.read_text()) - int(usage.read_text())
    except (OSError, ValueError):  # no such version of cgroups, or no limit ("max")
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
