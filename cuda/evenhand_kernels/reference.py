"""ReferenceKernels: the kernels in plain torch. Every other implementation is tested against it.

It also runs the engine on a CPU where nothing can be compiled, with oneDNN's packed weights where torch has them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, LayerKvCache, Linear

PACKING_ROWS = 32
"""How many rows oneDNN should expect when it chooses a weight's layout; any number of rows works."""


class ReferenceKernels:
    """Implements `Kernels`."""

    name = "torch"

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        weight = weight.float()  # no exact product of float32 activations with 16-bit weights otherwise
        bias = None if bias is None else bias.float()
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS)
            multiply = torch.ops.mkldnn._linear_pointwise
        except (AttributeError, RuntimeError):  # a torch without oneDNN
            return lambda x: F.linear(x, weight, bias)
        return lambda x: multiply(x, packed, bias, "none", [], "")

    def new_kv_cache(
        self, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
    ) -> LayerKvCache:
        """keys [num_blocks, num_kv_heads, head_dim, block_size], values [num_blocks, num_kv_heads, block_size, head_dim].

        In a block's keys the tokens are neighbours, so that one vector holds the scores of several tokens.
        """
        return LayerKvCache(
            keys=torch.zeros(num_blocks, num_kv_heads, head_dim, block_size, dtype=dtype),
            values=torch.zeros(num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype),
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

    def store_kv(self, qkv: Tensor, layer: AttentionLayer, batch: AttentionBatch, cache: LayerKvCache) -> None:
        queries, keys, values = _heads(qkv, layer)
        for heads, norm in ((queries, layer.q_norm), (keys, layer.k_norm)):
            if norm is not None:
                heads.copy_(self.rms_norm(heads, norm, layer.eps))
            if layer.cos_sin is not None:
                heads.copy_(_rotated(heads, layer.cos_sin[batch.positions]))
        block_size = cache.values.shape[2]
        blocks = batch.slot_mapping // block_size
        offsets = batch.slot_mapping % block_size
        cache.keys[blocks, :, :, offsets] = keys.to(cache.keys.dtype)
        cache.values[blocks, :, offsets, :] = values.to(cache.values.dtype)

    def attention(self, qkv: Tensor, layer: AttentionLayer, batch: AttentionBatch, cache: LayerKvCache) -> Tensor:
        queries, _, _ = _heads(qkv, layer)
        result = qkv.new_empty(len(qkv), layer.num_heads * layer.head_dim)
        starts = batch.cu_seqlens_q.tolist()
        for index, seq_len in enumerate(batch.seq_lens.tolist()):
            rows = slice(starts[index], starts[index + 1])
            num_blocks = -(-seq_len // cache.values.shape[2])
            blocks = batch.block_table[index, :num_blocks]
            keys = cache.keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :seq_len].to(qkv.dtype)
            values = cache.values[blocks].transpose(0, 1).flatten(1, 2)[:, :seq_len].to(qkv.dtype)
            result[rows] = _attend(queries[rows], keys, values, layer, batch.positions[rows])
        return result

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def _heads(qkv: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Views [num_tokens, heads, head_dim] of the queries, keys and values."""
    heads = qkv.view(len(qkv), -1, layer.head_dim)
    values_start = layer.num_heads + layer.num_kv_heads
    return heads[:, : layer.num_heads], heads[:, layer.num_heads : values_start], heads[:, values_start:]


def _rotated(heads: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin[:, None, :].chunk(2, dim=-1)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, layer: AttentionLayer, positions: Tensor) -> Tensor:
    """[num_rows, num_heads * head_dim] for queries [num_rows, num_heads, head_dim] over keys [kv_heads, seq_len, ...]."""
    group_size = layer.num_heads // layer.num_kv_heads
    grouped = queries.reshape(len(queries), layer.num_kv_heads, group_size, layer.head_dim)
    scores = torch.einsum("rhgd,hkd->rhgk", grouped, keys) / math.sqrt(layer.head_dim)
    distance = positions[:, None] - torch.arange(keys.shape[1])
    visible = distance >= 0
    if layer.sliding_window is not None:
        visible &= distance < layer.sliding_window
    scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
    return torch.einsum("rhgk,hkd->rhgd", scores.softmax(-1), values).flatten(1)
