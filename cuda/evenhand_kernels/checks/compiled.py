"""What the compiler makes of every variant, without a GPU: NVRTC builds it, NVIDIA's disassembler shows the machine code.

Asserted are those properties that speed stands on and that a change of source or compiler loses in silence: no spills, no
local memory, 16-byte accesses where data are moved, tensor cores where meant, and as many blocks on a multiprocessor as the
plan counts with.
"""

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.device import compiler_options, first_error
from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.cuda.variants import RESERVED_BYTES, SHARED_KIB, AttentionChoice
from evenhand_kernels.device import CompileError

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
REGISTERS = 65_536
"""Of a multiprocessor; given out to warps in units of 256."""
THREADS = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048}
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn

_BRANCH = re.compile(r"\bBRA(?:\.\w+)* .*`\((\.L_x_\d+)\)")
_SEPARATOR = b"\0cubin\0"
_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One variant for one architecture.

    Attributes:
        blocks: how many fit a multiprocessor, by registers, shared memory and threads.
        spill_bytes: of registers in local memory, with the stack.
        wide_loads, wide_stores: 16-byte accesses of global memory, LDGSTS and bulk copies among the loads; for sm_100 the
            compiler leaves some of them generic.
        bulk_copies: instructions that copy a whole slice (UBLKCP).
        products: instructions of tensor cores (HMMA, HGMMA).
        group_products: those of them of a warpgroup (HGMMA).
        serialized: whether the compiler waits for each of those before it starts the next.
        covered_waits: waits for them before which a softmax is computed: what the source says, and compilers may reorder.
        hot_loops: loops with products of tensor cores in them.
        bare_loops: those of them with no 16-byte load of what they multiply.
        local_accesses: of local memory.
    """

    variant: str
    architecture: str
    registers: int
    shared_bytes: int
    blocks: int
    spill_bytes: int
    wide_loads: int
    wide_stores: int
    bulk_copies: int
    products: int
    group_products: int
    serialized: bool
    covered_waits: int
    hot_loops: int
    bare_loops: int
    local_accesses: int


def shipped(architecture: str) -> Iterator[Variant]:
    """What is checked: every kernel, at every head size that has its own constants, in both dtypes."""
    sizes = (64, 96, 128, 256)
    for dtype, kv_dtype, head_dim in [
        *((BF16, kv_dtype, size) for kv_dtype in (BF16, FP8) for size in sizes),
        (FP16, FP16, 128),
        (FP16, FP8, 128),
    ]:
        yield from _attention(dtype, kv_dtype, head_dim, architecture)
        yield variants.write_kv(dtype, kv_dtype, head_dim, 16)
        yield variants.merge(dtype, kv_dtype, head_dim, 16)
    yield variants.attention(BF16, BF16, 128, 16, architecture, soft_cap=True)
    if variants.has_wgmma(architecture, BF16, BF16, 128):
        yield variants.attention(BF16, BF16, 128, 16, architecture, soft_cap=True, choice=AttentionChoice(wgmma=True))
    yield from _small()


def quick(architecture: str) -> Iterator[Variant]:
    """Attention takes seconds to compile: here at two head sizes, another pair for each architecture."""
    head_dim = {"sm_80": 64, "sm_89": 256, "sm_90": 128, "sm_100": 96}[architecture]
    for kv_dtype, size in ((BF16, head_dim), (FP8, 128 if head_dim != 128 else 64)):
        portable, *others = _attention(BF16, kv_dtype, size, architecture)
        yield from (portable, *others[-1:])  # the last has all that the others have
        yield variants.write_kv(BF16, kv_dtype, size, 16)
        yield variants.merge(BF16, kv_dtype, size, 16)
    yield from _small()


def _attention(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, architecture: str) -> Iterator[Variant]:
    """All that a device measures when it chooses."""
    bulk_copy = (False, True) if variants.has_bulk_copies(architecture) else (False,)
    wgmma = (False, True) if variants.has_wgmma(architecture, dtype, kv_dtype, head_dim) else (False,)
    for choice in map(variants.AttentionChoice._make, product(bulk_copy, wgmma)):
        yield variants.attention(dtype, kv_dtype, head_dim, 16, architecture, choice=choice)


def _small() -> Iterator[Variant]:
    for size in (576, 4096, 8192):
        yield variants.rms_norm(BF16, size)
    for dtype in (BF16, FP16):
        yield variants.silu_mul(dtype)
    yield variants.embedding(BF16)
    yield variants.block_copy()
    for dtype in (BF16, torch.float32):
        yield variants.sample(dtype)
        yield variants.adjust(dtype)
        yield variants.log_probabilities(dtype)
    yield variants.count_tokens()
    for bits, fp8 in ((4, False), (8, False), (8, True)):
        yield variants.dequantize(BF16, bits, fp8=fp8)
        for rows in variants.QUANTIZED_ROWS:
            yield variants.quantized_linear(BF16, bits, rows, fp8=fp8)


def available() -> str | None:
    """None, or what is missing here."""
    for module in ("cupy", "nvidia"):
        if find_spec(module) is None:
            return f"{module} is not installed: evenhand[gpu,test]"
    return None if _tool("nvdisasm") else "nvdisasm is not installed: evenhand[test]"


def compile_variant(variant: Variant, architecture: str, cache_dir: Path) -> Compiled:
    """Compiled and taken apart, or as remembered from the same source and compiler. Raises CompileError."""
    from cupy_backends.cuda.libs import nvrtc

    target = variant.architecture or architecture
    options = (*compiler_options(variant), *added_by_cupy(architecture), "--ptxas-options=-v")
    key = hashlib.sha256(repr((variant.text, options, nvrtc.getVersion())).encode()).hexdigest()[:16]
    remembered = cache_dir / f"{variant.kernel}-{target}-{key}"
    if not remembered.exists():
        cubin, log = _cubin(variant, options)
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_dir, delete=False) as file:
            file.write(log.encode() + _SEPARATOR + cubin)
        Path(file.name).rename(remembered)
    log_bytes, cubin = remembered.read_bytes().split(_SEPARATOR, 1)
    return _examine(variant, architecture, log_bytes.decode(), _disassembled(cubin))


def added_by_cupy(architecture: str) -> tuple[str, ...]:
    """To the options of a RawModule, by CuPy 14."""
    return "-ftz=true", f"-arch={architecture}", "--device-as-default-execution-space"


def faults(variant: Variant, compiled: Compiled) -> list[str]:
    """What is not as it must be."""
    found = []
    if compiled.spill_bytes or compiled.local_accesses:
        found.append(f"{compiled.spill_bytes} bytes in local memory, {compiled.local_accesses} accesses of it")
    if compiled.blocks < variant.blocks_per_sm:
        found.append(f"{compiled.blocks} blocks fit a multiprocessor, {variant.blocks_per_sm} are planned with")
    if variant.kernel in _MOVERS and not (compiled.wide_loads and compiled.wide_stores):
        found.append(f"{compiled.wide_loads} loads and {compiled.wide_stores} stores of 16 bytes")
    if compiled.wide_loads < (passes := _WIDE_LOADS.get(variant.kernel, 0)):
        found.append(f"{compiled.wide_loads} loads of 16 bytes, {passes} are meant")
    if ("BULK_COPY", None) in variant.constants and not compiled.bulk_copies:
        found.append("no bulk copies")
    if ("WGMMA", None) in variant.constants:
        parts = dict(variant.constants)["PROMPT_M"]
        if compiled.serialized or not compiled.group_products:
            found.append(f"{compiled.group_products} products of a warpgroup, serialized: {compiled.serialized}")
        if parts == 2 and compiled.covered_waits < parts:
            found.append(f"{compiled.covered_waits} waits for products are covered by a softmax")
    loops = _HOT_LOOPS.get(variant.kernel, 0)
    if compiled.hot_loops < loops or compiled.bare_loops:
        found.append(
            f"{compiled.hot_loops} loops with products of tensor cores, {loops} are meant; "
            f"{compiled.bare_loops} of them without a load of 16 bytes"
        )
    return found


_HOT_LOOPS = {"attention": 2, "quantized_linear": 1}
"""With products of tensor cores: decodes and prompts have one each."""

_WIDE_LOADS = {"sample": 5, "log_probabilities": 3, "adjust": 3, "merge": 3}
"""At least: one for each loop over a row of logits, those of an item of work, and of counts."""

_MOVERS = ("write_kv", "rms_norm", "silu_mul", "embedding", "block_copy", "dequantize")
"""Bound by moving elements: 16 bytes at a time, or they reach half of the bandwidth."""


def _cubin(variant: Variant, options: tuple[str, ...]) -> tuple[bytes, str]:
    from cupy.cuda.compiler import CompileException, _NVRTCProgram

    log = io.StringIO()
    program = _NVRTCProgram(variant.text, f"{variant.kernel}.cu", (), (), name_expressions=(), method="cubin")
    try:
        cubin, _ = program.compile(options, log_stream=log)
    except CompileException as error:
        raise CompileError(f"{variant}: {first_error(str(error))}") from error
    return cubin + b"\0", log.getvalue()  # CuPy drops the last byte, without which the tools see no ELF


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(_tool("nvdisasm")), "-c", file.name], capture_output=True, text=True, check=True, timeout=120
        )
    return done.stdout


def _examine(variant: Variant, architecture: str, log: str, code: str) -> Compiled:
    used, spills = _USED.search(log), _SPILLS.search(log)
    assert used is not None and spills is not None, f"{variant}: not understood: {log}"
    registers = int(used[1])
    per_warp = -(-registers * 32 // 256) * 256
    warps = -(-variant.num_threads // 32)
    blocks = min(
        REGISTERS // (per_warp * warps),
        SHARED_KIB[architecture] * 1024 // (variant.shared_bytes + RESERVED_BYTES),
        THREADS[architecture] // variant.num_threads,
    )
    lines = code.splitlines()
    bulk_copies = [bool(re.search(r"\bUBLKCP\b", line)) for line in lines]
    loads = [
        bulk or bool(re.search(r"\bLD(G|GSTS)?\.E\S*\.128", line))
        for line, bulk in zip(lines, bulk_copies, strict=True)
    ]
    products = [bool(re.search(r"\bHG?MMA\b", line)) for line in lines]
    hot = [(begin, end) for begin, end in _loops(lines) if any(products[begin:end])]
    return Compiled(
        variant=str(variant),
        architecture=architecture,
        registers=registers,
        shared_bytes=variant.shared_bytes,
        blocks=blocks,
        spill_bytes=sum(map(int, spills.groups())),
        wide_loads=sum(loads),
        wide_stores=sum(bool(re.search(r"\bSTG?\.E\S*\.128", line)) for line in lines),
        bulk_copies=sum(bulk_copies),
        products=sum(products),
        group_products=sum(bool(re.search(r"\bHGMMA\b", line)) for line in lines),
        serialized="serialized" in log,
        covered_waits=_covered_waits(lines),
        hot_loops=len(hot),
        bare_loops=sum(not any(loads[begin:end]) for begin, end in hot),
        local_accesses=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines),
    )


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """Lines [label, branch back to it]. With the function's end between, it is the way back from code out of line."""
    labels = {line.rstrip(":"): number for number, line in enumerate(lines) if line.startswith(".L_x_")}
    loops = []
    for number, line in enumerate(lines):
        branch = _BRANCH.search(line)
        begin = number if branch is None else labels.get(branch[1], number)
        if begin < number and not any("EXIT" in inside for inside in lines[begin:number]):
            loops.append((begin, number))
    return loops


def _covered_waits(lines: list[str]) -> int:
    """Waits for products of a warpgroup with at least half of a tile's exponentials since the last product was started."""
    covered = exponentials = 0
    for line in lines:
        if re.search(r"\bHGMMA\b", line):
            exponentials = 0
        elif "MUFU.EX2" in line:
            exponentials += 1
        elif "WARPGROUP.DEPBAR" in line:
            covered += exponentials >= 16
            exponentials = 0
    return covered


@cache
def _tool(name: str) -> str | None:
    """Of the wheels of the `test` extra, or on the path."""
    for folder in map(Path, sys.path):
        for tool in folder.glob(f"nvidia/cu*/bin/{name}"):
            return str(tool)
    return shutil.which(name)
