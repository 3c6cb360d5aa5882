"""Every variant, compiled for each architecture without a GPU, has the machine code that its speed stands on."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from evenhand_engine.model.cache import cache_dir
from evenhand_kernels.checks import compiled
from evenhand_kernels.checks.compiled import ARCHITECTURES, Compiled, compile_variant, faults, quick, shipped
from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.device import compiler_options
from evenhand_kernels.cuda.source import SOURCE_DIR, Variant
from evenhand_kernels.device import CompileError

MISSING = compiled.available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def check(variants: list[Variant], architecture: str) -> None:
    directory = cache_dir() / "compiled"
    with ThreadPoolExecutor(num_cores()) as pool:
        results = list(pool.map(lambda variant: compile_variant(variant, architecture, directory), variants))
    found = [
        f"{variant}: {fault}"
        for variant, result in zip(variants, results, strict=True)
        for fault in faults(variant, result)
    ]
    assert not found, "\n".join(found)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture: str) -> None:
    check(list(quick(architecture)), architecture)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_of_everything_shipped(architecture: str) -> None:
    check(list(shipped(architecture)), architecture)


def test_every_kernel_is_compiled() -> None:
    for architecture in ARCHITECTURES:
        kernels = {variant.kernel for variant in quick(architecture)}
        assert kernels == {path.stem for path in SOURCE_DIR.glob("*.cu")}


@pytest.mark.parametrize("wgmma", [False, True])
def test_what_is_checked_is_what_cupy_makes_of_a_module(monkeypatch: pytest.MonkeyPatch, wgmma: bool) -> None:
    """CuPy's own way from a source to a module, up to the compiler: without a device, which it would ask for its architecture."""
    from cupy.cuda import compiler

    asked: list[tuple[str, ...]] = []

    def remember(self: object, options: tuple[str, ...], log_stream: object = None) -> tuple[bytes, None]:
        asked.append(options)
        return b"", None

    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    monkeypatch.setattr(compiler._NVRTCProgram, "compile", remember)
    monkeypatch.setattr(compiler.function, "Module", lambda: Mock())
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    choice = variants.AttentionChoice(wgmma=wgmma)
    variant = variants.attention(torch.bfloat16, torch.bfloat16, 128, 16, "sm_90", choice=choice)
    compiler._compile_module_with_cache(variant.text, compiler_options(variant), arch="90")
    assert asked[-1] == (*compiler_options(variant), *compiled.added_by_cupy("sm_90"))


def test_faults_are_found() -> None:
    variant = Variant("attention", blocks_per_sm=2)
    sound = Compiled("attention", "sm_90", 200, 0, 2, 0, 8, 8, 0, 64, 0, False, 0, 2, 0, 0)
    assert faults(variant, sound) == []
    assert faults(replace(variant, constants=(("BULK_COPY", None),)), sound) == ["no bulk copies"]
    by_wgmma = replace(variant, constants=(("WGMMA", None), ("PROMPT_M", 2)))
    products = replace(sound, group_products=16, covered_waits=2)
    assert faults(by_wgmma, products) == []
    assert faults(by_wgmma, replace(products, group_products=0)) == ["0 products of a warpgroup, serialized: False"]
    assert faults(by_wgmma, replace(products, serialized=True)) == ["16 products of a warpgroup, serialized: True"]
    assert faults(by_wgmma, replace(products, covered_waits=1)) == ["1 waits for products are covered by a softmax"]
    assert faults(Variant("merge"), replace(sound, wide_loads=2)) == ["2 loads of 16 bytes, 3 are meant"]
    wrong = Compiled("attention", "sm_90", 255, 0, 1, 8, 0, 0, 0, 64, 0, False, 0, 2, 1, 3)
    assert len(faults(variant, wrong)) == 3


def test_a_kernel_that_spills_is_seen(tmp_path: Path) -> None:
    """The compiler's log and code are understood: an array indexed at run time must lie in local memory."""
    (tmp_path / "device.cuh").write_text((SOURCE_DIR / "device.cuh").read_text())
    (tmp_path / "local.cu").write_text(
        '#include "device.cuh"\nstruct Arguments {\n  float* to;\n  int32_t index;\n};\n'
        "KERNEL(local) {\n  float x[64];\n  for (int i = 0; i < 64; i++) x[i ^ arguments.index & 63] = arguments.to[i];\n"
        "  for (int i = 0; i < 64; i++) arguments.to[i * 5] = x[(i + arguments.index) & 63];\n}\n"
    )
    variant = Variant("local", (("BF16", None),), directory=tmp_path)
    result = compile_variant(variant, "sm_90", tmp_path)
    assert result.spill_bytes and result.local_accesses and faults(variant, result)
    (tmp_path / "wrong.cu").write_text(
        '#include "device.cuh"\nstruct Arguments {\n  float* to;\n};\nKERNEL(wrong) {\n  x = 1;\n}\n'
    )
    with pytest.raises(CompileError, match=r'wrong.cu\(6\): error: identifier "x" is undefined'):
        compile_variant(Variant("wrong", (("BF16", None),), directory=tmp_path), "sm_90", tmp_path)
