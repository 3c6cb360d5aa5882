"""Cases of write_kv, attention and merge: whole layers, through their launchers, against float64 over the history."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.checks.case import Case, assert_close, exact
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.cuda.variants import WGMMA_TILES, AttentionChoice, has_bulk_copies, has_wgmma
from evenhand_kernels.cuda.work import CudaPlan
from evenhand_kernels.device import Device
from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, KvCacheShape

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Requests as (tokens of this step, tokens in all); what came before the step is written by an earlier one.

    `padding` rows belong to no request, as in a recorded graph; then the launch has room to spare too.
    """

    requests: Sequence[tuple[int, int]]
    group: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    window: int | None = None
    soft_cap: float | None = None
    normed: bool = False
    rotated: bool = False
    padding: int = 0
    bulk_copy: bool = False
    wgmma: bool = False
    seed: int = 0
    tolerance: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tolerance", 0.05 if self.dtype == torch.bfloat16 else 0.01)

    def run(self, device: Device) -> None:
        rng = np.random.default_rng(self.seed)
        lens = [total for _, total in self.requests]
        heads = self.num_kv_heads * (self.group + 2)
        layer = self._layer(rng, device, max(lens))
        cache_dtype = torch.float8_e4m3fn if self.fp8 else self.dtype
        choice = AttentionChoice(
            bulk_copy=self.bulk_copy and has_bulk_copies(device.architecture),
            wgmma=self.wgmma and has_wgmma(device.architecture, self.dtype, cache_dtype, self.head_dim),
        )
        kernels = CudaKernels(device, self.dtype, choice=choice)
        table, num_blocks = self._block_table(rng)
        attend = kernels.attention(layer, KvCacheShape(num_blocks, self.block_size, cache_dtype))
        for memory in (attend.keys, attend.values):
            memory.fill_(0xFF)  # NaN in every format: what lies in a block beyond the request must not matter
        tokens = [rng.standard_normal((total, heads * self.head_dim), np.float32) for total in lens]

        history = [(0, total - new) for new, total in self.requests]
        if any(end for _, end in history):
            attend.write(self._qkv(tokens, history, 0, device), self._batch(history, table, 0, device))
        step = [(total - new, total) for new, total in self.requests]
        batch = self._batch(step, table, self.padding, device)
        output = attend(self._qkv(tokens, step, self.padding, device), self._plan(kernels, batch))
        assert_close(output[: len(output) - self.padding], self._expected(layer, tokens), self.tolerance)

    def _qkv(
        self, tokens: list[NDArray[np.float32]], parts: list[tuple[int, int]], padding: int, device: Device
    ) -> Tensor:
        rows = [token[begin:end] for token, (begin, end) in zip(tokens, parts, strict=True)]
        rows.append(np.zeros((padding, tokens[0].shape[1]), np.float32))
        return torch.from_numpy(np.concatenate(rows)).to(device.torch_device, self.dtype)

    def _plan(self, kernels: CudaKernels, batch: AttentionBatch) -> CudaPlan:
        if not self.padding:
            return kernels.plan(batch)
        shape = replace(kernels.work.shape(len(batch.seq_lens), len(batch.positions)), num_merges=(2,))
        words = np.full(shape.words, -1, np.int32)
        kernels.work.write(words, batch.seq_lens.cpu().numpy(), batch.cu_seqlens_q.cpu().numpy(), shape)
        return kernels.work.plan_of(batch, torch.from_numpy(words).to(batch.seq_lens.device), shape)

    def _layer(self, rng: np.random.Generator, device: Device, longest: int) -> AttentionLayer:
        def random(*shape: int) -> Tensor:
            return torch.from_numpy(rng.uniform(0.5, 1.5, shape).astype(np.float32)).to(device.torch_device)

        angles = np.arange(longest)[:, None] / 100 ** (np.arange(self.head_dim // 2) / (self.head_dim // 2))
        cos_sin = torch.from_numpy(np.concatenate((np.cos(angles), np.sin(angles)), 1).astype(np.float32))
        return AttentionLayer(
            num_heads=self.group * self.num_kv_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            eps=1e-5,
            cos_sin=cos_sin.to(device.torch_device) if self.rotated else None,
            q_norm=random(self.head_dim) if self.normed else None,
            k_norm=random(self.head_dim) if self.normed else None,
            sliding_window=self.window,
            soft_cap=self.soft_cap,
            key_scales=random(self.num_kv_heads) / 64 if self.fp8 else None,
            value_scales=random(self.num_kv_heads) / 64 if self.fp8 else None,
        )

    def _block_table(self, rng: np.random.Generator) -> tuple[NDArray[np.int32], int]:
        """Every request's blocks are neither in order nor neighbours; what is beyond them in a row is no block."""
        counts = [-(-total // self.block_size) for _, total in self.requests]
        shuffled = rng.permutation(sum(counts) + 1)
        table = np.full((len(counts), max(counts)), -1, np.int32)
        for row, count in enumerate(counts):
            table[row, :count] = shuffled[sum(counts[:row]) :][:count]
        return table, sum(counts) + 1

    def _batch(
        self, parts: list[tuple[int, int]], table: NDArray[np.int32], padding: int, device: Device
    ) -> AttentionBatch:
        positions = np.concatenate([np.arange(begin, end) for begin, end in parts])
        request = np.repeat(np.arange(len(parts)), [end - begin for begin, end in parts])
        slots = table[request, positions // self.block_size] * self.block_size + positions % self.block_size
        ends = np.cumsum([0] + [end - begin for begin, end in parts] + [0] * padding)
        lens = [end for _, end in parts] + [0] * padding
        table = np.concatenate((table, np.full((padding, table.shape[1]), -1, np.int32)))

        def tensor(values: NDArray[np.signedinteger] | list[int]) -> Tensor:
            return torch.from_numpy(np.asarray(values, np.int32)).to(device.torch_device)

        return AttentionBatch(
            positions=tensor(np.concatenate((positions, np.zeros(padding, np.int64)))),
            slot_mapping=tensor(np.concatenate((slots, np.full(padding, -1, np.int64)))),
            block_table=tensor(table),
            seq_lens=tensor(lens),
            cu_seqlens_q=tensor(ends),
        )

    def _expected(self, layer: AttentionLayer, tokens: list[NDArray[np.float32]]) -> Floats:
        results = []
        for (new, total), qkv in zip(self.requests, tokens, strict=True):
            rounded = exact(torch.from_numpy(qkv).to(self.dtype)).reshape(
                total, self.num_kv_heads * (self.group + 2), self.head_dim
            )
            num_heads = layer.num_heads
            queries, keys, values = np.split(rounded, [num_heads, num_heads + self.num_kv_heads], axis=1)
            queries, keys = self._prepared(queries, layer.q_norm, layer), self._prepared(keys, layer.k_norm, layer)
            if layer.key_scales is not None and layer.value_scales is not None:
                keys, values = _through_fp8(keys, layer.key_scales), _through_fp8(values, layer.value_scales)
            results.append(self._attend(queries[total - new :], keys, values).reshape(new, num_heads * self.head_dim))
        return np.concatenate(results)

    def _prepared(self, x: Floats, norm: Tensor | None, layer: AttentionLayer) -> Floats:
        if norm is not None:
            x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + layer.eps) * exact(norm)
        if layer.cos_sin is not None:
            cos, sin = np.split(exact(layer.cos_sin)[: len(x), None], 2, axis=-1)
            first, second = np.split(x, 2, axis=-1)
            x = np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)
        return x

    def _attend(self, queries: Floats, keys: Floats, values: Floats) -> Floats:
        positions = np.arange(len(keys) - len(queries), len(keys))
        results = np.empty_like(queries)
        for head in range(queries.shape[1]):
            scores = queries[:, head] @ keys[:, head // self.group].T / math.sqrt(self.head_dim)
            if self.soft_cap is not None:
                scores = self.soft_cap * np.tanh(scores / self.soft_cap)
            distance = positions[:, None] - np.arange(len(keys))
            scores[(distance < 0) | (distance >= (self.window or len(keys)))] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True)) if scores.size else scores
            results[:, head] = weights / weights.sum(-1, keepdims=True) @ values[:, head // self.group]
        return results


def _through_fp8(x: Floats, scales: Tensor) -> Floats:
    """[tokens, kv_heads, head_dim] as it comes back from a cache in e4m3."""
    column = exact(scales)[:, None]
    stored = torch.from_numpy(np.clip(x / column, -448, 448).astype(np.float32)).to(torch.float8_e4m3fn)
    return exact(stored.float()) * column


LENGTHS = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 64), (1, 65), (1, 200)]
CHUNKS = [(1, 1), (5, 5), (16, 16), (17, 17), (40, 40), (3, 100), (33, 130), (1, 90)]
MIXED = [(1, 33), (70, 70), (0, 20), (1, 1), (20, 300), (1, 150)]


def _cases() -> dict[str, AttentionCase]:
    cases = {
        "decodes at block borders": AttentionCase(requests=LENGTHS),
        "decodes at the end of the block table": AttentionCase(requests=[(1, length) for length in (16, 32, 64, 128)]),
        "chunks at block borders": AttentionCase(requests=CHUNKS),
        "decodes beside chunks and an empty request": AttentionCase(requests=MIXED, rotated=True, normed=True),
        "a graph's padding": AttentionCase(requests=[(1, 40), (1, 9)], padding=3),
        "a graph's merges, more than it has blocks": AttentionCase(
            requests=[(1, 600)] * 3, num_kv_heads=1, group=2, padding=1
        ),
        "window, decodes": AttentionCase(requests=LENGTHS, window=50),
        "window, chunks": AttentionCase(requests=CHUNKS, window=20),
        "window of one": AttentionCase(requests=[(1, 40), (18, 40)], window=1),
        "soft cap": AttentionCase(requests=MIXED, soft_cap=1.5),
        "blocks of 32": AttentionCase(requests=MIXED, block_size=32, rotated=True),
        "split": AttentionCase(requests=[(1, 1400), (1, 3), (40, 700)], num_kv_heads=1, dtype=torch.float16),
        "split, window": AttentionCase(requests=[(1, 1400), (1, 3)], num_kv_heads=1, window=700),
        "split, two heads": AttentionCase(requests=[(1, 1500), (1, 3)], num_kv_heads=2, group=3),
        "28,000 tokens beside short ones": AttentionCase(
            requests=[(1, 28_000), *[(1, 1 + i * 7 % 61) for i in range(255)]], num_kv_heads=1, group=2
        ),
    }
    for group in (1, 3, 7, 8, 16, 20):
        cases[f"group of {group}"] = AttentionCase(requests=[(1, 70), (6, 40), (25, 25)], group=group, num_kv_heads=1)
    for head_dim in (16, 32, 80, 96, 128, 256):
        cases[f"head size {head_dim}"] = AttentionCase(
            requests=[(1, 70), (40, 50), (1, 600)], head_dim=head_dim, num_kv_heads=1, rotated=True, normed=True
        )
    for name in (
        "decodes at block borders",
        "decodes at the end of the block table",
        "decodes beside chunks and an empty request",
        "window, decodes",
        "blocks of 32",
        "split",
        "split, window",
        "soft cap",
        "a graph's padding",
        "28,000 tokens beside short ones",
    ):
        cases[f"bulk copies, {name}"] = replace(cases[name], bulk_copy=True)
    for head_dim in (16, 80, 128, 256):
        cases[f"bulk copies, head size {head_dim}"] = replace(cases[f"head size {head_dim}"], bulk_copy=True)
    prompts = {
        "chunks at block borders": CHUNKS,
        "several tiles": [(70, 330), (200, 200), (17, 64), (33, 400)],
        "the last tile of every length": [(20, 64 + tokens) for tokens in (0, 1, 15, 16, 17, 48, 63)],
    }
    prompts["the end of the block table"] = [(length, length) for length in (64, 128)]
    for name, requests in prompts.items():
        cases[f"wgmma, {name}"] = AttentionCase(requests=requests, wgmma=True)
    for name in (
        "decodes beside chunks and an empty request",
        "window, chunks",
        "window of one",
        "soft cap",
        "blocks of 32",
        "split",
        "group of 3",
        "group of 20",
    ):
        cases[f"wgmma, {name}"] = replace(cases[name], wgmma=True)
    cases["wgmma, window, several tiles"] = AttentionCase(requests=[(8, 400), (40, 300)], window=150, wgmma=True)
    for head_dim in WGMMA_TILES:
        for dtype in (torch.bfloat16, torch.float16):
            cases[f"wgmma, head size {head_dim}, {dtype}"] = AttentionCase(
                requests=[(40, 50), (30, 300), (1, 20)], group=3, head_dim=head_dim, dtype=dtype, wgmma=True
            )
    cases["wgmma, bulk copies"] = replace(
        cases["decodes beside chunks and an empty request"], wgmma=True, bulk_copy=True
    )
    for head_dim in (64, 96, 128, 256):
        for dtype in (torch.bfloat16, torch.float16):
            cases[f"fp8, head size {head_dim}, {dtype}"] = AttentionCase(
                requests=[(1, 70), (40, 50), (1, 600)], head_dim=head_dim, num_kv_heads=1, dtype=dtype, fp8=True
            )
            cases[f"bulk copies, fp8, head size {head_dim}, {dtype}"] = replace(
                cases[f"fp8, head size {head_dim}, {dtype}"], bulk_copy=True
            )
    return cases


KERNELS = frozenset({"write_kv", "attention", "merge"})
CASES = [
    Case(f"attention: {name}", KERNELS, case.run, small=sum(total for _, total in case.requests) < 3000)
    for name, case in _cases().items()
]
