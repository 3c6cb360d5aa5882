"""Which variant of a kernel runs where: its constants, threads, shared memory, and how many blocks share a multiprocessor."""

from typing import NamedTuple

import torch

from evenhand_kernels.cuda.source import Variant

SHARED_KIB = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_103": 228, "sm_120": 100}
"""Shared memory of a multiprocessor (CUDA C++ Programming Guide, technical specifications by compute capability)."""

RESERVED_BYTES = 1024
"""That the system keeps for each block."""

NUM_WARPS = 4
DECODE_ROWS = 16
MAX_STAGES = 4
WGMMA_TILES = {64: (64, 4), 96: (64, 2), 128: (64, 2), 256: (32, 2)}
"""By head size: tokens of a tile, and how many tiles of keys and of values there is room for: prompt_wgmma.cuh."""

DTYPES = {torch.bfloat16: (("BF16", None),), torch.float16: ()}


class AttentionChoice(NamedTuple):
    """Which of those that do the same thing an attention kernel is made of.

    Attributes:
        bulk_copy: decodes copy whole slices, where architectures `has_bulk_copies`.
        wgmma: prompts multiply by wgmma, where there `has_wgmma`.
    """

    bulk_copy: bool = False
    wgmma: bool = False


PORTABLE = AttentionChoice()
"""Runs everywhere."""


def supported_architectures() -> list[str]:
    return list(SHARED_KIB)


def has_bulk_copies(architecture: str) -> bool:
    """Whether it has cp.async.bulk and mbarriers that count its bytes: sm_90 and later."""
    return int(architecture.rstrip("af").removeprefix("sm_")) >= 90


def has_wgmma(architecture: str, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> bool:
    """Whether prompts can be multiplied by wgmma: on sm_90, keys and values of the queries' own dtype, at these head sizes."""
    return architecture == "sm_90" and kv_dtype == dtype and head_dim in WGMMA_TILES


def element_constants(dtype: torch.dtype) -> tuple[tuple[str, int | None], ...]:
    """Of kernels whose elements are `dtype`, bfloat16 or float16."""
    return DTYPES[dtype]


def kv_constants(
    dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, block_size: int
) -> tuple[tuple[str, int | None], ...]:
    """Of kernels that touch the paged cache, of `kv_dtype`: `dtype` itself or float8_e4m3fn."""
    fp8: tuple[tuple[str, int | None], ...] = (("KV_FP8", None),) if kv_dtype == torch.float8_e4m3fn else ()
    return (*DTYPES[dtype], *fp8, ("HEAD_DIM", head_dim), ("BLOCK_SIZE", block_size))


def write_kv(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, block_size: int) -> Variant:
    return Variant("write_kv", kv_constants(dtype, kv_dtype, head_dim, block_size), blocks_per_sm=8)


def write_kv_lanes(head_dim: int) -> int:
    """Lanes that share a head: LANES in write_kv.cu."""
    return 1 << max(0, head_dim // 16 - 1).bit_length()


def merge(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, block_size: int) -> Variant:
    return Variant("merge", kv_constants(dtype, kv_dtype, head_dim, block_size), blocks_per_sm=4)


def prompt_rows(head_dim: int) -> int:
    """Rows of the largest unit of work, by the registers that their output takes: PROMPT_ROWS in prompt.cuh."""
    return 16 * _prompt_m(head_dim) * NUM_WARPS


def attention(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    architecture: str,
    *,
    soft_cap: bool = False,
    choice: AttentionChoice = PORTABLE,
    max_stages: int = MAX_STAGES,
) -> Variant:
    """The deepest pipeline of which two blocks fit a multiprocessor; where that is none, the deepest that fits once."""
    available = SHARED_KIB[architecture.rstrip("af")] * 1024
    row_bytes = head_dim * kv_dtype.itemsize
    blocks, stages = next(
        (blocks, stages)
        for blocks in (2, 1)
        for stages in range(max_stages, 0, -1)
        if blocks * (_attention_bytes(head_dim, row_bytes, stages, choice) + RESERVED_BYTES) <= available
    )
    constants = (
        *kv_constants(dtype, kv_dtype, head_dim, block_size),
        *((("SOFT_CAP", None),) if soft_cap else ()),
        *((("BULK_COPY", None),) if choice.bulk_copy else ()),
        *((("WGMMA", None),) if choice.wgmma else ()),
        ("DECODE_STAGES", stages),
        ("PROMPT_M", _prompt_m(head_dim)),
    )
    shared = _attention_bytes(head_dim, row_bytes, stages, choice)
    specific = f"{architecture}a" if choice.wgmma else None
    return Variant("attention", constants, shared_bytes=shared, blocks_per_sm=blocks, architecture=specific)


def _prompt_m(head_dim: int) -> int:
    return 2 if head_dim <= 128 else 1


def _attention_bytes(head_dim: int, row_bytes: int, stages: int, choice: AttentionChoice) -> int:
    """`Shared` in attention.cu."""
    barriers = 2 * NUM_WARPS * stages * 8 if choice.bulk_copy else 0
    slices = 2 * NUM_WARPS * stages * 16 * row_bytes
    parts = NUM_WARPS * DECODE_ROWS * (head_dim + 4 + 2) * 4
    decode = barriers + DECODE_ROWS * head_dim * 2 + max(slices, parts)
    if choice.wgmma:
        tile, tiles = WGMMA_TILES[head_dim]
        tile_bytes = tiles * (2 * tile * row_bytes + 8)
    else:
        tile_bytes = 2 * (64 if head_dim <= 96 else 32) * row_bytes
    return max(decode, prompt_rows(head_dim) * head_dim * 2 + tile_bytes)


def rms_norm(dtype: torch.dtype, size: int) -> Variant:
    """One block a row, with as many threads as there are chunks of 8, at most 512."""
    num_threads = min(512, max(32, -(-(size // 8) // 32) * 32))
    return Variant(
        "rms_norm", (*DTYPES[dtype], ("SIZE", size)), num_threads, shared_bytes=4 * (num_threads // 32), blocks_per_sm=2
    )


def silu_mul(dtype: torch.dtype) -> Variant:
    return Variant("silu_mul", DTYPES[dtype], num_threads=256, blocks_per_sm=4)


def embedding(dtype: torch.dtype) -> Variant:
    return Variant("embedding", DTYPES[dtype], num_threads=256, blocks_per_sm=4)


def block_copy() -> Variant:
    return Variant("block_copy", DTYPES[torch.bfloat16], num_threads=256, blocks_per_sm=4)


SAMPLING_THREADS = 1024


def sample(dtype: torch.dtype, num_threads: int = SAMPLING_THREADS) -> Variant:
    """Of logits that are `dtype`, float32 too."""
    shared = 8 * (2048 + num_threads // 32 + 2)
    return Variant("sample", _logits(dtype), num_threads, shared_bytes=shared)


def adjust(dtype: torch.dtype) -> Variant:
    return Variant("adjust", _logits(dtype), num_threads=256, blocks_per_sm=4)


def log_probabilities(dtype: torch.dtype, num_threads: int = SAMPLING_THREADS) -> Variant:
    return Variant("log_probabilities", _logits(dtype), num_threads, shared_bytes=8 * (num_threads // 32))


def count_tokens() -> Variant:
    return Variant("count_tokens", DTYPES[torch.bfloat16], num_threads=512, blocks_per_sm=2)


def _logits(dtype: torch.dtype) -> tuple[tuple[str, int | None], ...]:
    return (("BF16", None), ("LOGITS_FP32", None)) if dtype == torch.float32 else DTYPES[dtype]


QUANTIZED_ROWS = (16, 32, 64)
"""Rows of x that a block of quantized_linear makes, in turn: as few as hold all of them."""


def quantized_linear(dtype: torch.dtype, bits: int, rows: int, *, fp8: bool = False) -> Variant:
    """`rows`: one of QUANTIZED_ROWS; `fp8`: codes are floats, of 8 bits."""
    num_threads = 256
    shared = (num_threads // 32) * rows * (32 + 2) * 4
    constants = (*_codes(dtype, bits, fp8), ("ROWS", rows))
    blocks = 2 if rows * bits <= 32 * 4 else 1  # by the registers that sums and codes take
    return Variant("quantized_linear", constants, num_threads, shared_bytes=shared, blocks_per_sm=blocks)


def dequantize(dtype: torch.dtype, bits: int, *, fp8: bool = False) -> Variant:
    return Variant("dequantize", _codes(dtype, bits, fp8), num_threads=256, blocks_per_sm=4)


def _codes(dtype: torch.dtype, bits: int, fp8: bool) -> tuple[tuple[str, int | None], ...]:
    return (*DTYPES[dtype], ("BITS", bits), *((("FP8", None),) if fp8 else ()))
