"""Loads the C++ kernels, and the planner of a GPU's host: compiled ahead of time for a level of processor, or here and now.

`python -m evenhand_kernels.cpu.library DIRECTORY` compiles them ahead of time, for every level.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from evenhand_kernels.cpu.levels import LEVELS, NATIVE, compiler_flags, usable_levels

SOURCE_DIR = Path(__file__).parent
SOURCE = SOURCE_DIR / "kernels.cpp"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-tree-sink",  # GCC 12 moves sums behind all conversions of an unrolled loop, which then wait in memory
    "-pthread",
    "-fPIC",
    "-shared",
]
PLANNER = SOURCE_DIR / "plan.cpp"
PLANNER_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
"""For any processor: nothing in it would gain from a newer one."""

SHIPPED_DIR = Path(sys.prefix, "share/evenhand/kernels")
"""Where an installation, as that of a container image, has kernels that were compiled ahead of time."""

COMPILE_SECONDS = 1800  # a minute to four on a machine with nothing else to do


class CompileError(Exception):
    """There is no usable C++ compiler. The message says what was tried and what it answered."""


def load_library(cache_dir: Path, shipped_dir: Path = SHIPPED_DIR) -> ctypes.CDLL:
    """The kernels of `shipped_dir` for the best level that this processor has; else those in `cache_dir`, where they are
    compiled unless that was done before by this compiler on this processor.

    Raises CompileError.
    """
    shipped = (shipped_dir / _shipped_name(level) for level in usable_levels())
    library = next(filter(Path.exists, shipped), None)
    if library is None:
        compiler = _compiler()
        library = cache_dir / f"cpu-{_key(compiler)}.so"
        if not library.exists():
            _compile([*compiler, *FLAGS, *compiler_flags(NATIVE)], SOURCE, library)
    return _load(library)


def load_planner(cache_dir: Path, shipped_dir: Path = SHIPPED_DIR) -> ctypes.CDLL:
    """What plans the steps of a GPU's host: that of `shipped_dir`, else that in `cache_dir`, where it is compiled once.

    Raises CompileError.
    """
    library = shipped_dir / _planner_name()
    if not library.exists():
        library = cache_dir / _planner_name()
    if not library.exists():
        _compile([*_compiler(), *PLANNER_FLAGS], PLANNER, library)
    return _load(library)


def compile_ahead(directory: Path) -> None:
    """Compiles the kernels for every level into `directory`, where `load_library` and `load_planner` look. Raises CompileError."""
    for level in LEVELS:
        _compile([*_compiler(), *FLAGS, *compiler_flags(level)], SOURCE, directory / _shipped_name(level))
    _compile([*_compiler(), *PLANNER_FLAGS], PLANNER, directory / _planner_name())


def is_compiled_ahead(directory: Path) -> bool:
    """Whether that was done there, of these sources."""
    return all((directory / name).exists() for name in (*map(_shipped_name, LEVELS), _planner_name()))


def _shipped_name(level: str) -> str:
    """With a digest, so that sources never meet a library that was compiled from others."""
    return f"cpu-{level}-{_sources_digest().hexdigest()[:16]}.so"


def _planner_name() -> str:
    digest = hashlib.sha256("\0".join(PLANNER_FLAGS).encode() + PLANNER.read_bytes())
    return f"plan-{platform.machine()}-{digest.hexdigest()[:16]}.so"


def _load(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompileError(f"{library}: cannot be loaded: {error}") from error


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "g++"]


def _key(compiler: list[str]) -> str:
    """Changes with everything that the result depends on."""
    digest = _sources_digest()
    for part in (_output([*compiler, "--version"]), platform.machine(), _processor_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _sources_digest() -> "hashlib._Hash":
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for source in sorted([SOURCE, *SOURCE_DIR.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest


def _processor_features() -> str:
    """What `-march=native` looks at, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _compile(command: list[str], source: Path, library: Path) -> None:
    """Compile into a temporary file that takes its name in one step, so that two processes may do it at once."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            result = Path(directory) / library.name
            _output([*command, str(source), "-o", str(result)])
            result.rename(library)
    except OSError as error:
        raise CompileError(f"cannot write to {library.parent}: {error}") from error


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}: {done.stderr.strip()[-800:]}")
    return done.stdout


if __name__ == "__main__":
    compile_ahead(Path(sys.argv[1]))
