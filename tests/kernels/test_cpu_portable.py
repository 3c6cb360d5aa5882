"""The C++ kernels where no instruction is assumed beyond what every processor of a kind has: compiled, and computed with."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from evenhand_kernels.cpu.library import FLAGS, SOURCE_DIR

PROGRAM = Path(__file__).with_name("portable.cpp")
PROCESSORS = {
    "x86_64": (["g++", "-march=x86-64"], []),
    "aarch64": (["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]),
}
"""Compiler, and what runs the result."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processor", PROCESSORS)
def test_linear_layers_and_attention_are_right_on(processor: str, tmp_path: Path) -> None:
    """In NEON on aarch64, emulated."""
    compiler, runner = PROCESSORS[processor]
    missing = [program for program in (compiler[0], *runner) if shutil.which(program) is None]
    if missing or (not runner and platform.machine() != processor):
        pytest.skip(f"no {', '.join(missing) or processor} here")
    flags = [flag for flag in FLAGS if flag not in ("-O3", "-fPIC", "-shared")]
    binary = str(tmp_path / "portable")
    command = [*compiler, *flags, "-O1", "-Wno-psabi", f"-I{SOURCE_DIR}", str(PROGRAM), "-o", binary]
    subprocess.run(command, check=True)
    done = subprocess.run([*runner, binary], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
