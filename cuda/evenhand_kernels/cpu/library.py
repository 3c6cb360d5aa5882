"""Compiles the C++ kernels for this very processor and loads them."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE_DIR = Path(__file__).parent
SOURCE = SOURCE_DIR / "kernels.cpp"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-fPIC",
    "-shared",
]
COMPILE_SECONDS = 600  # 20 on a machine with nothing else to do


class CompileError(Exception):
    """There is no usable C++ compiler. The message says what was tried and what it answered."""


def load_library(cache_dir: Path) -> ctypes.CDLL:
    """The compiled kernels, from `cache_dir` if they were compiled before by this compiler on this processor.

    Raises CompileError.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "g++"]
    library = cache_dir / f"cpu-{_key(compiler)}.so"
    if not library.exists():
        _compile(compiler, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompileError(f"{library}: cannot be loaded: {error}") from error


def _key(compiler: list[str]) -> str:
    """Changes with everything that the result depends on."""
    digest = hashlib.sha256()
    for source in sorted([SOURCE, *SOURCE_DIR.glob("*.h")]):
        digest.update(source.read_bytes())
    for part in (*FLAGS, _output([*compiler, "--version"]), platform.machine(), _processor_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor_features() -> str:
    """What `-march=native` looks at, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _compile(compiler: list[str], library: Path) -> None:
    """Compile into a temporary file that takes its name in one step, so that two processes may do it at once."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            result = Path(directory) / library.name
            _output([*compiler, *FLAGS, str(SOURCE), "-o", str(result)])
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
