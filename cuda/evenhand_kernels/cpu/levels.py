"""Levels of processor that the kernels are compiled for ahead of time, where no compiler is there at run time."""

from pathlib import Path

_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})

_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

LEVELS = {
    "x86-64-v4+avx512bf16+avx512vnni+avx512vbmi": _V4 | {"avx512_bf16", "avx512_vnni", "avx512vbmi"},
    "x86-64-v4": _V4,
    "x86-64-v3": _V3,
}
"""The compiler's names, each with what it has beyond one of them, best first, and the features of /proc/cpuinfo that it asks for."""

NATIVE = "native"
"""The level of the processor that compiles."""

CPUINFO = Path("/proc/cpuinfo")


def compiler_flags(level: str) -> list[str]:
    """For code of that level."""
    processor, *extensions = level.split("+")
    return [f"-march={processor}", *(f"-m{extension}" for extension in extensions)]


def usable_levels(cpuinfo: Path = CPUINFO) -> list[str]:
    """The levels whose code runs on this processor, best first; none where the system does not tell its features."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    features = {feature for line in lines if line.startswith("flags") for feature in line.partition(":")[2].split()}
    return [level for level, needed in LEVELS.items() if needed <= features]
