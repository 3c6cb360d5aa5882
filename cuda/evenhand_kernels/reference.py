"""ReferenceKernels: the kernels in plain torch. Every other implementation is tested against it.

It also runs the engine on a CPU where nothing can be compiled, with oneDNN's packed weights where torch has them, and on a
GPU as what the CUDA kernels are compared with.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evenhand_kernels.drawing import draw_rows
from evenhand_kernels.kernels import (
    Attention,
    AttentionBatch,
    AttentionLayer,
    AttentionPlan,
    Draw,
    Embedding,
    KvCacheShape,
    Linear,
    LogProbabilities,
)
from evenhand_kernels.logarithms import log_probabilities
from evenhand_kernels.quantized import QuantizedTensor, Weight, widened

CPU = torch.device("cpu")

PACKING_ROWS = 32
"""How many rows oneDNN should expect when it chooses a weight's layout; any number of rows works."""


class ReferenceKernels:
    """Implements `Kernels`."""

    name = "torch"

    def __init__(self, torch_device: torch.device = CPU) -> None:
        self.torch_device = torch_device

    def linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        wide = widened(weight).to(self.torch_device)  # activations are float32, and a mixed product would round them
        bias = None if bias is None else bias.to(self.torch_device)
        if self.torch_device.type != "cpu":
            return lambda x: F.linear(x, wide, bias)
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(wide, PACKING_ROWS)
            multiply = torch.ops.mkldnn._linear_pointwise
        except (AttributeError, RuntimeError):  # a torch without oneDNN
            return lambda x: F.linear(x, wide, bias)
        return lambda x: multiply(x, packed, bias, "none", [], "")

    def embedding(self, weight: Weight) -> Embedding:
        if isinstance(weight, QuantizedTensor) and self.torch_device.type == "cpu":
            codes = weight
            return lambda ids: codes.rows(ids).dequantized()
        table = (widened(weight) if isinstance(weight, QuantizedTensor) else weight).to(self.torch_device)
        return lambda ids: table[ids].float()

    def tied_embedding(self, weight: Weight) -> tuple[Embedding, Linear]:
        return self.embedding(weight), self.linear(weight, None)

    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        gate_up = self.linear(weight, bias)

        def gated(x: Tensor) -> Tensor:
            gate, up = gate_up(x).chunk(2, dim=-1)
            return F.silu(gate) * up

        return gated

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        tensors = {
            name: getattr(batch, name).to(self.torch_device)
            for name in ("positions", "slot_mapping", "block_table", "seq_lens", "cu_seqlens_q")
        }
        return AttentionPlan(replace(batch, **tensors))

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> Attention:
        return _Attention(layer, cache, self.torch_device)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _rms_norm(residual.add_(x), weight, eps)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        return draw_rows(logits.cpu(), draws)

    def log_probabilities(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
        return log_probabilities(logits, token_ids, num_top)


class _Attention:
    """Keys and values are [num_blocks, block_size, num_kv_heads, head_dim]."""

    def __init__(self, layer: AttentionLayer, cache: KvCacheShape, device: torch.device) -> None:
        shape = (cache.num_blocks, cache.block_size, layer.num_kv_heads, layer.head_dim)
        self._layer = layer
        self._block_size = cache.block_size
        self._keys = torch.zeros(shape, dtype=cache.dtype, device=device)
        self._values = torch.zeros(shape, dtype=cache.dtype, device=device)

    def __call__(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        layer, batch = self._layer, plan.batch
        heads = qkv.view(len(qkv), layer.num_heads + 2 * layer.num_kv_heads, layer.head_dim)
        sizes = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
        queries, keys, values = torch.split(heads, sizes, dim=1)
        for part, norm in ((queries, layer.q_norm), (keys, layer.k_norm)):
            if norm is not None:
                part.copy_(_rms_norm(part, norm, layer.eps))
            if layer.cos_sin is not None:
                part.copy_(_rotated(part, layer.cos_sin[batch.positions]))
        self._keys.flatten(0, 1)[batch.slot_mapping] = keys.to(self._keys.dtype)
        self._values.flatten(0, 1)[batch.slot_mapping] = values.to(self._values.dtype)
        starts = batch.cu_seqlens_q.tolist()
        results = [
            self._attend(queries[start:end], batch.positions[start:end], batch.block_table[index], seq_len)
            for index, (start, end, seq_len) in enumerate(
                zip(starts, starts[1:], batch.seq_lens.tolist(), strict=False)
            )
        ]
        return torch.cat(results).flatten(1)

    def _attend(self, queries: Tensor, positions: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
        """One request: [num_rows, num_heads, head_dim] for queries of that shape."""
        blocks = block_table[: -(-seq_len // self._block_size)]
        keys = self._keys[blocks].flatten(0, 1)[:seq_len].to(queries.dtype)
        values = self._values[blocks].flatten(0, 1)[:seq_len].to(queries.dtype)
        grouped = queries.reshape(len(queries), keys.shape[1], -1, self._layer.head_dim)
        scores = torch.einsum("rhgd,khd->rhgk", grouped, keys) / math.sqrt(self._layer.head_dim)
        if self._layer.soft_cap is not None:
            scores = torch.tanh(scores / self._layer.soft_cap) * self._layer.soft_cap
        distance = positions[:, None] - torch.arange(seq_len, device=positions.device)
        visible = distance >= 0
        if self._layer.sliding_window is not None:
            visible &= distance < self._layer.sliding_window
        weights = scores.masked_fill(~visible[:, None, None, :], -math.inf).softmax(-1)
        return torch.einsum("rhgk,khd->rhgd", weights, values).flatten(1, 2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of [num_tokens, heads, head_dim] (arXiv 2104.09864)."""
    cos, sin = cos_sin[:, None, :].chunk(2, dim=-1)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
