"""Kernels: what a decoder needs of a device beside an embedding lookup. One implementation for each kind of device.

All work on torch tensors. Activations are float32 on the CPU; weights and the KV cache are float32, bfloat16 or float16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
"""Maps [num_tokens, in_features] to [num_tokens, out_features]; holds its weight in the layout of the device."""


class LayerKvCache(NamedTuple):
    """Keys and values of one layer, in blocks; the layout is the device's own."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The requests of one step; request i owns the rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of the activations.

    Attributes:
        positions: int32 [num_tokens], in its request, of each row.
        slot_mapping: int32 [num_tokens], where its key and value go: block id * block_size + offset in the block.
        block_table: int32 [num_requests, max_blocks], the block ids of each request; the rest of a row is undefined.
        seq_lens: int32 [num_requests], tokens of each request up to and including this step's.
        cu_seqlens_q: int32 [num_requests + 1].
    """

    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What is constant for the attention of one layer.

    Attributes:
        cos_sin: float32 [max_model_len, head_dim], cosines then sines; None: no rotation in this layer.
        q_norm, k_norm: float32 [head_dim], weights of the RMSNorm of each head; None: no norm.
        sliding_window: how many tokens a query sees, itself included; None: all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    cos_sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    sliding_window: int | None


class Kernels(Protocol):
    """Operations of one device. Results are new tensors, unless the docstring says otherwise."""

    @property
    def name(self) -> str:
        """For logs: which implementation this is."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare x @ weight.T + bias; weight is [out_features, in_features]. The arguments may be freed after."""
        ...

    def new_kv_cache(
        self, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
    ) -> LayerKvCache:
        """Memory for the keys and values of one layer."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to `residual` in place; return its rms_norm."""
        ...

    def store_kv(self, qkv: Tensor, layer: AttentionLayer, batch: AttentionBatch, cache: LayerKvCache) -> None:
        """Norm and rotate the queries and keys in `qkv` in place, and write keys and values to the cache.

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], the query heads first, then keys, then values.
        """
        ...

    def attention(self, qkv: Tensor, layer: AttentionLayer, batch: AttentionBatch, cache: LayerKvCache) -> Tensor:
        """Causal attention of the queries in `qkv` over the cache: [num_tokens, num_heads * head_dim].

        Query head h reads the KV head h // (num_heads / num_kv_heads). Decodes and prompt chunks are one case.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [num_tokens, 2 * n], the halves being gate and up (arXiv 2002.05202)."""
        ...
