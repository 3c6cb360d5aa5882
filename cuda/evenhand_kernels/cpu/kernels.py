"""CpuKernels: the kernels in C++, called through ctypes."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.cpu.native import (
    AttentionStructure,
    BatchStructure,
    DecoderStructure,
    LayerStructure,
    Native,
    WeightStructure,
)
from evenhand_kernels.cpu.packed import DTYPES, Packed, packed
from evenhand_kernels.cpu.sampling import draw, log_probabilities
from evenhand_kernels.kernels import (
    Attention,
    AttentionBatch,
    AttentionLayer,
    AttentionPlan,
    DecoderOperations,
    Draw,
    Embedding,
    Forward,
    KvCacheShape,
    Linear,
    LogProbabilities,
)
from evenhand_kernels.quantized import QuantizedTensor, Weight

ACTIVATION_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int16: 3}
"""`ActivationDtype` of activations.h."""

MAX_HEAD_DIM = 256


class CpuKernels:
    """Implements `Kernels`."""

    name = "cpu"
    torch_device = torch.device("cpu")

    def __init__(
        self,
        cache_dir: Path,
        num_threads: int | None = None,
        activation_dtype: torch.dtype | None = torch.float32,
        *,
        tiled: bool = True,
    ) -> None:
        """Compiles the kernels into `cache_dir` if they are not there. Raises CompileError.

        Args:
            num_threads: None: one for each core.
            activation_dtype: float32, or to what is rounded what enters a linear layer: bfloat16, to which
                plain weights are rounded too where many rows pass over them; or int8 or int16, codes with a scale for each row
                and group of the weight, or for 32 inputs. Sums, and all else, are float32. None: beside plain weights of
                float32 or float16, which would lose, float32; beside bfloat16, bfloat16 where the processor is faster by it; beside
                weights in codes whichever of bfloat16 and int16 it multiplies faster, or float32.
            tiled: whether many rows are multiplied by tiles of AMX where processor and system have them: those of bfloat16
                with plain weights, and of int16 with codes, as the sum of two numbers in bfloat16, which is more precise.
        """
        self.num_threads = num_threads or num_cores()
        self._native = Native(cache_dir, self.num_threads)
        self.tiled = tiled and bool(self._native.library.evenhand_has_tiles())
        self._chooses = activation_dtype is None
        self._prefers_integers = bool(self._native.library.evenhand_prefers_integers())
        self.activation_dtype = activation_dtype or self._beside_codes()

    def _beside_codes(self) -> torch.dtype:
        choices = (torch.int16, torch.bfloat16) if self._prefers_integers else (torch.bfloat16, torch.int16)
        return next((dtype for dtype in choices if self._multiplies(dtype)), torch.float32)

    @property
    def has_products(self) -> bool:
        """Whether the processor multiplies activations of this dtype itself; else that takes longer than float32."""
        return self._multiplies(self.activation_dtype)

    def _multiplies(self, dtype: torch.dtype) -> bool:
        return bool(self._native.library.evenhand_has_products(ACTIVATION_DTYPES[dtype]))

    def linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        return _Linear(self._native, self._packed(weight, bias))

    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        return _Linear(self._native, self._packed(weight, bias, gated=True))

    def embedding(self, weight: Weight) -> Embedding:
        return _Embedding(self._native, self._packed(weight))

    def tied_embedding(self, weight: Weight) -> tuple[Embedding, Linear]:
        packed = self._packed(weight)
        return _Embedding(self._native, packed), _Linear(self._native, packed)

    def fused(self, operations: DecoderOperations) -> Forward:
        return _Forward(self._native, operations)

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        structure = BatchStructure(
            num_tokens=len(batch.positions),
            num_requests=len(batch.seq_lens),
            table_stride=batch.block_table.stride(0),
            positions=batch.positions.data_ptr(),
            slots=batch.slot_mapping.data_ptr(),
            block_table=batch.block_table.data_ptr(),
            cu_seqlens_q=batch.cu_seqlens_q.data_ptr(),
        )
        return _Plan(batch, structure)

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> Attention:
        return _Attention(self._native, layer, cache, self.tiled)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(None, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x.data_ptr(), residual, weight, eps)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        _check(logits)
        return draw(self._native, logits, draws)

    def log_probabilities(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
        _check(logits)
        return log_probabilities(self._native, logits, token_ids, num_top)

    def _packed(self, weight: Weight, bias: Tensor | None = None, *, gated: bool = False) -> Packed:
        result = packed(self._native, weight, bias, gated=gated)
        dtype = None if isinstance(weight, QuantizedTensor) else weight.dtype
        result.structure.activations = ACTIVATION_DTYPES[self._entering(dtype)]
        result.structure.tiled = self.tiled
        return result

    def _entering(self, weight_dtype: torch.dtype | None) -> torch.dtype:
        """To what the inputs of a weight are rounded; None: it is in codes."""
        if weight_dtype is None or not self._chooses:
            return self.activation_dtype
        is_faster = self._multiplies(torch.bfloat16) and (self.tiled or not self._prefers_integers)
        return torch.bfloat16 if weight_dtype is torch.bfloat16 and is_faster else torch.float32

    def multiplied_as(self, weight_dtype: torch.dtype | None) -> torch.dtype:
        """As what many rows are multiplied with a weight of that dtype, None: in codes; float32 where the processor has no instruction
        for what they are rounded to."""
        entering = self._entering(weight_dtype)
        suits = weight_dtype is None or entering is torch.bfloat16
        return entering if suits and self._multiplies(entering) else torch.float32

    def _norm(self, x: int | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        _check(residual)
        y = torch.empty_like(residual)
        self._native.library.evenhand_add_rms_norm(
            self._native.pool, x, residual.data_ptr(), weight.data_ptr(), y.data_ptr(), *residual.shape, eps
        )
        return y


class _Linear:
    def __init__(self, native: Native, packed: Packed) -> None:
        self._native, self._packed, self.structure = native, packed, packed.structure
        self._out_features = self.structure.outputs // (2 if self.structure.gated else 1)

    def __call__(self, x: Tensor) -> Tensor:
        _check(x)
        y = x.new_empty(len(x), self._out_features)
        self._native.library.evenhand_linear(self._native.pool, self.structure, x.data_ptr(), y.data_ptr(), len(x))
        return y


class _Embedding:
    def __init__(self, native: Native, packed: Packed) -> None:
        self._native, self._packed, self.structure = native, packed, packed.structure

    def __call__(self, ids: Tensor) -> Tensor:
        y = torch.empty(len(ids), self.structure.inputs)
        self._native.library.evenhand_embedding(
            self._native.pool, self.structure, ids.data_ptr(), y.data_ptr(), len(ids)
        )
        return y


class _Attention:
    def __init__(self, native: Native, layer: AttentionLayer, cache: KvCacheShape, tiled: bool) -> None:
        if layer.head_dim > MAX_HEAD_DIM or cache.block_size % 16:
            raise ValueError(
                f"head_dim {layer.head_dim} must be at most {MAX_HEAD_DIM}, "
                f"block_size {cache.block_size} a multiple of 16"
            )
        if layer.soft_cap is not None:
            raise ValueError(f"a soft cap of attention scores ({layer.soft_cap}) is not computed by the CPU's kernels")
        padded_head_dim = -(-layer.head_dim // 16) * 16
        blocks = (cache.num_blocks, layer.num_kv_heads)
        self._keys = native.zeros((*blocks, layer.head_dim, cache.block_size), cache.dtype)
        self._values = native.zeros((*blocks, cache.block_size, padded_head_dim), cache.dtype)
        self._layer = layer  # keeps alive what the structure points to
        self.structure = AttentionStructure(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            block_size=cache.block_size,
            window=layer.sliding_window or 0,
            cache_dtype=DTYPES[cache.dtype],
            tiled=tiled,
            scale=1 / math.sqrt(layer.head_dim),
            eps=layer.eps,
            cos_sin=_pointer(layer.cos_sin),
            q_norm=_pointer(layer.q_norm),
            k_norm=_pointer(layer.k_norm),
            keys=self._keys.data_ptr(),
            values=self._values.data_ptr(),
        )
        self._native = native

    def __call__(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        _check(qkv)
        assert isinstance(plan, _Plan), "the plan was made by other kernels"
        result = qkv.new_empty(len(qkv), self._layer.num_heads * self._layer.head_dim)
        self._native.library.evenhand_attention(
            self._native.pool, self.structure, plan.structure, qkv.data_ptr(), result.data_ptr()
        )
        return result


@dataclass(frozen=True, slots=True)
class _Plan(AttentionPlan):
    structure: BatchStructure


class _Forward:
    """A whole decoder in one call."""

    def __init__(self, native: Native, operations: DecoderOperations) -> None:
        self._native = native
        self._operations = operations  # keeps alive what the structures point to
        layers = (LayerStructure * len(operations.layers))()
        for structure, layer in zip(layers, operations.layers, strict=True):
            for name in ("input_norm", "post_attention_norm"):
                setattr(structure, name, getattr(layer, name).data_ptr())
            for name in ("qkv", "attention", "output", "gate_up", "down"):
                setattr(structure, name, ctypes.addressof(getattr(layer, name).structure))
        self._layers = layers
        self._structure = DecoderStructure(
            num_layers=len(layers),
            layers=ctypes.addressof(layers),
            embedding=ctypes.addressof(_structure(operations.embedding)),
            norm=operations.norm.data_ptr(),
            lm_head=ctypes.addressof(_structure(operations.lm_head)),
            eps=operations.eps,
        )
        self._vocab_size = int(_structure(operations.lm_head).outputs)
        self._floats_per_token = native.library.evenhand_activation_floats(self._structure)
        self._memory = torch.empty(0)

    def __call__(self, input_ids: Tensor, plan: AttentionPlan, logits_indices: Tensor) -> Tensor:
        assert isinstance(plan, _Plan), "the plan was made by other kernels"
        num_floats = len(input_ids) * self._floats_per_token
        if num_floats > len(self._memory):
            self._memory = torch.empty(num_floats)
        logits = torch.empty(len(logits_indices), self._vocab_size)
        self._native.library.evenhand_forward(
            self._native.pool,
            self._structure,
            plan.structure,
            input_ids.data_ptr(),
            logits_indices.data_ptr(),
            len(logits_indices),
            self._memory.data_ptr(),
            logits.data_ptr(),
        )
        return logits


def _structure(operation: Embedding | Linear) -> WeightStructure:
    assert isinstance(operation, _Embedding | _Linear)
    return operation.structure


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(x: Tensor) -> None:
    assert x.dtype == torch.float32 and x.is_contiguous(), "C++ reads activations as contiguous float32"
