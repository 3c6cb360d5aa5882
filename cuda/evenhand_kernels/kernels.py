"""Kernels: what a decoder needs of a device beside an embedding lookup. One implementation for each kind of device.

All work on torch tensors. On the CPU activations and sums are float32; weights are float32, bfloat16, float16 or quantised,
the KV cache is float32, bfloat16 or float16. What a kernel can prepare once (the layout of a weight, the memory of a KV cache) is prepared when its operation is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.quantized import Weight

Linear = Callable[[Tensor], Tensor]
"""Maps [num_tokens, in_features] to [num_tokens, out_features]. Holds its weight in the layout of the device."""

Embedding = Callable[[Tensor], Tensor]
"""Maps int32 token ids [num_tokens] to rows of a weight, [num_tokens, in_features], in the dtype that these kernels keep
the residual in; float32 on the CPU."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """The attention of one layer.

    Attributes:
        cos_sin: float32 [max_model_len, head_dim], cosines then sines; None: no rotation in this layer.
        q_norm, k_norm: float32 [head_dim], weights of the RMSNorm of each head; None: no norm.
        sliding_window: how many tokens a query sees, itself included; None: all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap) before the softmax; None: they stay.
        key_scales, value_scales: float32 [num_kv_heads], what the numbers in an fp8 cache are multiplied with; None: 1.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    cos_sin: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KvCacheShape:
    """The paged memory for the keys and values of one layer; block_size is a multiple of 16 tokens."""

    num_blocks: int
    block_size: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The requests of one step; request i owns the rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of the activations.

    Attributes:
        positions: int32 [num_tokens], the place of each row in its request.
        slot_mapping: int32 [num_tokens], where its key and value go: block id * block_size + offset in the block.
        block_table: int32 [num_requests, max_blocks], the block ids of each request; the rest of a row is undefined.
        seq_lens: int32 [num_requests], tokens of each request up to and including this step's.
        cu_seqlens_q: int32 [num_requests + 1].
        num_decodes: the first requests of the batch, which have few rows each: those past their prompt.
    """

    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    num_decodes: int = 0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How one step's attention is computed, the same for all layers. Kernels extend it with what theirs need."""

    batch: AttentionBatch


Attention = Callable[[Tensor, AttentionPlan], Tensor]
"""Attention of one layer over its paged KV cache, which it owns, by the plan that the same kernels made of the step.

Takes [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: query heads, then keys, then values. Norms and
rotates queries and keys in place, stores keys and values at `slot_mapping`, and returns the causal attention of the
queries, [num_tokens, num_heads * head_dim]. Query head h reads the KV head h // (num_heads / num_kv_heads). Decodes and
prompt chunks are one case.
"""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The operations of one layer, all of the same kernels. Norms are float32 [hidden_size]."""

    input_norm: Tensor
    qkv: Linear
    attention: Attention
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderOperations:
    """The operations of a whole decoder, in their order; `norm` comes before `lm_head`."""

    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: Tensor
    lm_head: Linear
    eps: float


Forward = Callable[[Tensor, AttentionPlan, Tensor], Tensor]
"""One step: maps int32 token ids [num_tokens], the plan of its attention, and the int32 indices of the rows whose next token is wanted,
ascending, to their logits, float32 [num_samples, vocab_size]."""


class Draw(NamedTuple):
    """How one row of logits becomes a token.

    Temperature 0: the likeliest, the first of equals. `top_k` 0 and `top_p` 1 keep all tokens; top_p counts the mass that
    top_k left, and what is as likely as the last token kept is kept too. `seed`, below 2**64, and `counter` give the number
    by which a token is drawn: the first output of numpy's Philox(key=seed, counter=counter). `allowed`,
    [ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is set where token t may come; None: all may.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    counter: int
    allowed: NDArray[np.int32] | None = None


class LogProbabilities(NamedTuple):
    """How likely a token of each row is, and which are the likeliest: natural logarithms of the row's softmax.

    Attributes:
        own: float32 [num_rows], of the rows' tokens.
        ranks: int32 [num_rows], how many tokens are likelier, and one.
        top_token_ids: int32 [num_rows, num_top], the likeliest, best first; of equals any, the first one first.
        top: float32 [num_rows, num_top], theirs.
    """

    own: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_token_ids: NDArray[np.int32]
    top: NDArray[np.float32]

    @classmethod
    def empty(cls, num_rows: int, num_top: int) -> Self:
        """Memory for so many."""
        shape = num_rows, num_top
        return cls(
            np.empty(num_rows, np.float32),
            np.empty(num_rows, np.int32),
            np.empty(shape, np.int32),
            np.empty(shape, np.float32),
        )


class Kernels(Protocol):
    """Operations of one device. Inputs are contiguous; results are new tensors."""

    @property
    def name(self) -> str:
        """For logs: which implementation this is."""
        ...

    @property
    def torch_device(self) -> torch.device:
        """Where activations, norms' weights and tables must be."""
        ...

    def linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        """x @ weight.T + bias; weight is [out_features, in_features], a float32 bias [out_features]."""
        ...

    def embedding(self, weight: Weight) -> Embedding:
        """The rows of weight, [vocab_size, hidden_size]."""
        ...

    def tied_embedding(self, weight: Weight) -> tuple[Embedding, Linear]:
        """`embedding` and `linear` over one copy of the weight."""
        ...

    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        """silu(gate) * up, with gate and up being the halves of x @ weight.T + bias (arXiv 2002.05202)."""
        ...

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> Attention:
        """Attention of one layer, with memory of its own for keys and values."""
        ...

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        """What all layers' attention needs of a step, once. Valid as long as the batch's tensors are."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add x to `residual` in place; return the rms_norm of that."""
        ...

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        """A token of each row of `logits`, float32 [num_rows, vocab_size].

        None for a row in which a token that may come has a NaN or an infinity, or in which none may come.
        """
        ...

    def log_probabilities(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
        """Of a token in each row of `logits`, float32 [num_rows, vocab_size] on the CPU, and of the `num_top` likeliest,
        or of all that there are. NaN in a row that holds one."""
        ...


@runtime_checkable
class FusingKernels(Kernels, Protocol):
    """Kernels that compute a whole step in one call."""

    def fused(self, operations: DecoderOperations) -> Forward:
        """The same results as the operations one by one."""
        ...
