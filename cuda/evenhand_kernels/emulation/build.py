"""Compiles the emulation once, and a library for each kernel variant, into the user's cache by content."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.device import CompileError

SOURCE_DIR = Path(__file__).parent
SOURCES = ("scheduler.cpp", "memory.cpp", "synchronization.cpp", "matrix.cpp", "wgmma.cpp")
RUNTIME_FLAGS = ("-std=c++20", "-O3", "-march=native", "-g1", "-fPIC", "-shared", "-pthread")
KERNEL_FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-shared", "-DEMULATION", "-Wno-unknown-pragmas", "-x", "c++")
CHECKS = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
"""Calls before every access; the library that answers them is ours."""
COMPILE_SECONDS = 900


def kernel_library(cache_dir: Path, variant: Variant, *, checked: bool) -> Path:
    """The variant's library. Raises CompileError."""
    runtime = runtime_library(cache_dir)
    source = variant.text
    flags = (*KERNEL_FLAGS, *(CHECKS if checked else ("-O2",)), *variant.definitions)
    library = cache_dir / f"{variant.kernel}-{_digest(source, runtime.name, _header(), *flags)}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache_dir) as directory:
        file, compiled = Path(directory) / f"{variant.kernel}.cu", Path(directory) / library.name
        file.write_text(source, encoding="utf-8")
        objects = Path(directory) / "kernel.o"
        _run(
            [
                *_compiler(),
                *(flag for flag in flags if flag != "-shared"),
                "-I",
                str(SOURCE_DIR),
                "-c",
                str(file),
                "-o",
                str(objects),
            ]
        )
        _run([*_compiler(), "-shared", str(objects), str(runtime), "-Wl,-rpath,$ORIGIN", "-o", str(compiled)])
        compiled.rename(library)
    return library


@cache
def runtime_library(cache_dir: Path) -> Path:
    """The emulation itself. Raises CompileError."""
    texts = [(SOURCE_DIR / name).read_text(encoding="utf-8") for name in SOURCES]
    headers = [path.read_text(encoding="utf-8") for path in sorted(SOURCE_DIR.glob("*.h"))]
    library = cache_dir / f"emulation-{_digest(*texts, *headers, *RUNTIME_FLAGS, _version(), _processor())}.so"
    if not library.exists():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompileError(f"cannot write to {cache_dir}: {error}") from error
        with tempfile.TemporaryDirectory(dir=cache_dir) as directory:
            compiled = Path(directory) / library.name
            sources = [str(SOURCE_DIR / name) for name in SOURCES]
            _run([*_compiler(), *RUNTIME_FLAGS, f"-Wl,-soname,{library.name}", *sources, "-o", str(compiled), "-ldl"])
            compiled.rename(library)
    return library


def source_line(library: Path, offset: int) -> str:
    """File and line of the kernel at an address, for messages; '' where binutils are missing."""
    tool = shutil.which("addr2line")
    if tool is None or offset == 0:
        return ""
    command = [tool, "-i", "-e", str(library), hex(offset - 1)]  # -i: through the wrappers that are inlined there
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    lines = re.findall(r"^(?:.*/)?(\w+\.cuh?:\d+)", done.stdout, re.MULTILINE)
    return next(iter(lines), "")


@cache
def _header() -> str:
    return (SOURCE_DIR / "device.h").read_text(encoding="utf-8")


@cache
def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "g++"]


@cache
def _version() -> str:
    return _run([*_compiler(), "--version"])


@cache
def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-800:])
        raise CompileError(f"{command[0]}: {first}")
    return done.stdout
