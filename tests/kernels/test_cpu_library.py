"""Which compiled library is loaded: one that was shipped for the processor, else one that is compiled here."""

import os
import shutil
from pathlib import Path

import pytest

from evenhand_kernels.cpu import library
from evenhand_kernels.cpu.levels import LEVELS, compiler_flags, usable_levels
from evenhand_kernels.cpu.library import CompileError, compile_ahead, load_library, load_planner

V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        (f"fpu sse2 {V4} avx512_bf16 avx512_vnni avx512vbmi", [*LEVELS]),
        (f"fpu sse2 {V4} avx512_vnni", ["x86-64-v4", "x86-64-v3"]),
        (f"fpu sse2 {V3} avx512f", ["x86-64-v3"]),
        ("fpu sse2 avx avx2", []),
    ],
)
def test_levels_are_those_whose_every_feature_the_processor_has(tmp_path: Path, flags: str, levels: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: avx512\nflags\t\t: {flags}\n")
    assert usable_levels(tmp_path / "cpuinfo") == levels
    assert usable_levels(tmp_path / "missing") == []


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler whose result is a library that any machine can load; it writes down what it was asked for."""
    source, made = tmp_path / "empty.c", tmp_path / "made.so"
    source.write_text("")
    gcc = shutil.which("gcc") or pytest.skip("no C compiler")
    os.spawnv(os.P_WAIT, gcc, [gcc, "-shared", "-o", str(made), str(source)])
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho "$*" >> {tmp_path}/asked\n'
        f'while [ "$1" != -o ]; do shift; done\ncp {made} "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path / "asked"


def test_every_level_is_compiled_ahead_and_the_best_usable_one_is_loaded(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ahead(tmp_path / "shipped")
    asked = compiler.read_text().splitlines()
    assert all(" ".join(compiler_flags(level)) in line for level, line in zip(LEVELS, asked[:-1], strict=True))
    assert "plan.cpp" in asked[-1] and "-march" not in asked[-1]
    assert "-march=x86-64-v4 -mavx512bf16 -mavx512vnni -mavx512vbmi " in asked[0] and "-mavx512bf16" not in asked[1]
    monkeypatch.setenv("CXX", "/nowhere/compiler")
    for level in LEVELS:
        monkeypatch.setattr(library, "usable_levels", lambda level=level: [level])
        loaded = load_library(tmp_path / "cache", tmp_path / "shipped")
        assert Path(loaded._name).name.startswith(f"cpu-{level}-")
    assert Path(load_planner(tmp_path / "cache", tmp_path / "shipped")._name).name.startswith("plan-")
    assert not (tmp_path / "cache").exists()


def test_libraries_of_other_sources_are_not_loaded(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ahead(tmp_path / "shipped")
    monkeypatch.setattr(library, "FLAGS", [*library.FLAGS, "-g"])
    loaded = load_library(tmp_path / "cache", tmp_path / "shipped")
    assert Path(loaded._name).parent == tmp_path / "cache"
    assert "-march=native" in compiler.read_text().splitlines()[-1]


def test_without_library_and_compiler_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/compiler")
    monkeypatch.setattr(library, "usable_levels", list)
    for load in (load_library, load_planner):
        with pytest.raises(CompileError, match="/nowhere/compiler"):
            load(tmp_path / "cache", tmp_path / "shipped")
