"""The C++ kernels against the same operations in float64, at sizes that fit no tile."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from evenhand_kernels.cpu.kernels import CpuKernels
from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, KvCacheShape
from evenhand_kernels.reference import ReferenceKernels
from harness.tensors import assert_close, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFERENCE = ReferenceKernels()


@pytest.mark.parametrize("size", [1, 8, 33, 576])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_add_rms_norm(cpu_kernels: CpuKernels, size: int, rows: int) -> None:
    x, residual, weight = randn(rows, size), randn(rows, size, seed=1) * 3, randn(size, seed=2)
    expected_residual = residual.double() + x.double()
    expected = REFERENCE.rms_norm(expected_residual, weight.double(), 1e-5)

    assert_close(cpu_kernels.rms_norm(x + residual, weight, 1e-5), expected, 1e-5)
    assert_close(cpu_kernels.add_rms_norm(x, residual, weight, 1e-5), expected, 1e-5)
    assert_close(residual, expected_residual, 1e-6)


@dataclass(frozen=True)
class Part:
    """What one step computes of a request: tokens [start, end)."""

    request: int
    start: int
    end: int


LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130, 1000)
NUM_SLOTS = 3200
STEPS = [
    [Part(request, 0, length) for request, length in enumerate(LENGTHS) if length < 1000],  # whole prompts
    [Part(8, 0, 500)],  # the first part of a long one
    [Part(0, 0, 1), Part(3, 16, 17), Part(7, 129, 130), Part(8, 500, 951)],  # decodes beside a chunk
    [Part(8, 951, 999), Part(5, 63, 64)],
    [Part(8, 999, 1000), Part(6, 64, 65)],
    [Part(8, 999, 1000)],  # alone: its context is split between the threads
    [Part(8, 700, 703)],
]


def batch_of(parts: Sequence[Part], block_size: int) -> AttentionBatch:
    """Gives every request blocks that are neither in order nor neighbours, no two the same."""
    generator = torch.Generator().manual_seed(3)
    shuffled = torch.randperm(NUM_SLOTS // block_size, generator=generator, dtype=torch.int32)
    blocks_of: list[Tensor] = []
    taken = 0
    for length in LENGTHS:
        blocks_of.append(shuffled[taken : taken + -(-length // block_size)])
        taken += len(blocks_of[-1])
    table = torch.full((len(parts), 64), -1, dtype=torch.int32)
    for row, part in enumerate(parts):
        table[row, : len(blocks_of[part.request])] = blocks_of[part.request]
    positions = [torch.arange(part.start, part.end, dtype=torch.int32) for part in parts]
    slots = [
        blocks_of[part.request][position // block_size] * block_size + position % block_size
        for part, position in zip(parts, positions, strict=True)
    ]
    sizes = torch.tensor([0] + [part.end - part.start for part in parts])
    return AttentionBatch(
        positions=torch.cat(positions),
        slot_mapping=torch.cat(slots),
        block_table=table,
        seq_lens=torch.tensor([part.end for part in parts], dtype=torch.int32),
        cu_seqlens_q=sizes.cumsum(0).int(),
    )


def check_attention(kernels: CpuKernels, layer: AttentionLayer, cache_dtype: torch.dtype, block_size: int = 16) -> None:
    """Run STEPS on a cache full of NaN; equal to float64 step by step."""
    num_blocks = NUM_SLOTS // block_size
    attend = kernels.attention(layer, KvCacheShape(num_blocks, block_size, cache_dtype))
    exact_dtype = torch.float64 if cache_dtype == torch.float32 else cache_dtype
    expect = REFERENCE.attention(layer, KvCacheShape(num_blocks, block_size, exact_dtype))
    width = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    batch = batch_of([Part(8, 0, 1000)], block_size)
    for first in range(0, NUM_SLOTS, 800):  # what was in a block before must not matter
        everywhere = torch.arange(first, first + 800, dtype=torch.int32)
        poison = replace(
            batch,
            positions=batch.positions[:800],
            slot_mapping=everywhere,
            cu_seqlens_q=torch.tensor([0, 800], dtype=torch.int32),
            seq_lens=torch.tensor([800], dtype=torch.int32),
        )
        attend(torch.full((800, width), torch.nan), kernels.plan(poison))

    for seed, parts in enumerate(STEPS):
        batch = batch_of(parts, block_size)
        qkv = randn(len(batch.positions), width, seed=seed)
        expected = expect(qkv.double(), REFERENCE.plan(batch))
        # A rotated key that lies between two 16-bit numbers may be rounded to either, which changes results by the order of
        # a step of that dtype (0.4 of one at most, measured). By tiles queries and weights have 16 bits.
        rounds_apart = layer.cos_sin is not None and cache_dtype != torch.float32
        tolerance = 2e-4 if kernels.tiled else 5e-5
        assert_close(
            attend(qkv, kernels.plan(batch)), expected, 2 * torch.finfo(cache_dtype).eps if rounds_apart else tolerance
        )


@pytest.mark.parametrize("head_dim", [64, 96, 128, 40])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_attention(cpu_kernels: CpuKernels, head_dim: int, group_size: int) -> None:
    check_attention(cpu_kernels, AttentionLayer(2 * group_size, 2, head_dim, eps=1e-6), torch.float32)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 40])
def test_attention_over_a_16_bit_cache(attending_kernels: CpuKernels, cache_dtype: torch.dtype, head_dim: int) -> None:
    check_attention(attending_kernels, AttentionLayer(6, 2, head_dim, eps=1e-6), cache_dtype)


@pytest.mark.parametrize(
    "layer",
    [
        AttentionLayer(100, 1, 128, eps=1e-6),
        AttentionLayer(2, 2, 256, eps=1e-6),
        AttentionLayer(6, 2, 96, eps=1e-6, sliding_window=50),
    ],
    ids=["large group", "large head", "window"],
)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16])
def test_attention_of_many_queries(
    attending_kernels: CpuKernels, cache_dtype: torch.dtype, layer: AttentionLayer
) -> None:
    check_attention(attending_kernels, layer, cache_dtype, block_size=32)


@pytest.mark.parametrize("window", [1, 16, 50, 900])
@pytest.mark.parametrize("group_size", [1, 3])
def test_attention_with_a_sliding_window(cpu_kernels: CpuKernels, window: int, group_size: int) -> None:
    layer = AttentionLayer(2 * group_size, 2, 64, eps=1e-6, sliding_window=window)
    check_attention(cpu_kernels, layer, torch.float32)


def test_what_attention_would_leave_out_is_refused(cpu_kernels: CpuKernels) -> None:
    layer, cache = AttentionLayer(6, 2, 64, eps=1e-6, soft_cap=30.0), KvCacheShape(4, 16, torch.float32)
    with pytest.raises(ValueError, match=r"soft cap of attention scores \(30.0\) is not computed by the CPU's kernels"):
        cpu_kernels.attention(layer, cache)


def test_attention_with_a_group_larger_than_a_tile(cpu_kernels: CpuKernels) -> None:
    check_attention(cpu_kernels, AttentionLayer(100, 1, 64, eps=1e-6), torch.float32)


@pytest.mark.parametrize("block_size", [32, 64])
def test_attention_with_larger_blocks(cpu_kernels: CpuKernels, block_size: int) -> None:
    check_attention(cpu_kernels, AttentionLayer(6, 2, 64, eps=1e-6), torch.float32, block_size)


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 40])
def test_attention_norms_and_rotates_heads(
    attending_kernels: CpuKernels, cache_dtype: torch.dtype, head_dim: int
) -> None:
    angles = torch.arange(1000.0)[:, None] * torch.logspace(0, -3, head_dim // 2)
    layer = AttentionLayer(
        num_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
        eps=1e-6,
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=1),
        q_norm=randn(head_dim, seed=1),
        k_norm=randn(head_dim, seed=2),
    )
    check_attention(attending_kernels, layer, cache_dtype)
