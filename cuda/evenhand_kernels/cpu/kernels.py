"""CpuKernels: the kernels in C++, called through ctypes."""

import ctypes
import math
import weakref
from ctypes import c_float, c_int, c_int32, c_int64, c_long, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evenhand_kernels.cpu.cores import num_cores
from evenhand_kernels.cpu.library import load_library
from evenhand_kernels.kernels import Attention, AttentionBatch, AttentionLayer, AttentionPlan, KvCacheShape, Linear

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers that `kernels.cpp` dispatches on."""

MAX_HEAD_DIM = 256


class CpuKernels:
    """Implements `Kernels`."""

    name = "cpu"

    def __init__(self, cache_dir: Path, num_threads: int | None = None) -> None:
        """Compiles the kernels into `cache_dir` if they are not there. None: a thread for each core. Raises CompileError."""
        self.num_threads = num_threads or num_cores()
        self._native = _Native(cache_dir, self.num_threads)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return _Linear(self._native, weight, bias, gated=False)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return _Linear(self._native, weight, bias, gated=True)

    def embed(self, embedding: Tensor, input_ids: Tensor) -> Tensor:
        return embedding[input_ids].float()

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        structure = _Batch(
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
        return _Attention(self._native, layer, cache)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(None, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x.data_ptr(), residual, weight, eps)

    def _norm(self, x: int | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        _check(residual)
        y = torch.empty_like(residual)
        self._native.library.evenhand_add_rms_norm(
            self._native.pool, x, residual.data_ptr(), weight.data_ptr(), y.data_ptr(), *residual.shape, eps
        )
        return y


class _Native:
    """The compiled library, and threads that end when nothing needs them any more."""

    def __init__(self, cache_dir: Path, num_threads: int) -> None:
        self.library = load_library(cache_dir)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.pool = self.library.evenhand_new_pool(num_threads)
        weakref.finalize(self, self.library.evenhand_delete_pool, self.pool).atexit = False


class _Linear:
    def __init__(self, native: _Native, weight: Tensor, bias: Tensor | None, *, gated: bool) -> None:
        self._native = native
        self._shape = (*weight.shape, int(gated))
        self._out_features = len(weight) // 2 if gated else len(weight)
        self._dtype = DTYPES[weight.dtype]
        self._packed = _packed(native, weight, gated)
        self._bias = None if bias is None else _packed(native, bias.float()[:, None], gated)
        self._pointers = (self._packed.data_ptr(), _pointer(self._bias))

    def __call__(self, x: Tensor) -> Tensor:
        _check(x)
        y = x.new_empty(len(x), self._out_features)
        self._native.library.evenhand_linear(
            self._native.pool, x.data_ptr(), *self._pointers, y.data_ptr(), self._dtype, len(x), *self._shape
        )
        return y


def _packed(native: _Native, weight: Tensor, gated: bool) -> Tensor:
    """`weight`, [outputs, inputs], in the layout of linear.h."""
    weight = weight.contiguous()
    packed = weight.new_empty(native.library.evenhand_packed_size(*weight.shape, gated))
    native.library.evenhand_pack(
        native.pool, weight.data_ptr(), packed.data_ptr(), DTYPES[weight.dtype], *weight.shape, gated
    )
    return packed


class _Attention:
    def __init__(self, native: _Native, layer: AttentionLayer, cache: KvCacheShape) -> None:
        if layer.head_dim > MAX_HEAD_DIM or cache.block_size % 16:
            raise ValueError(
                f"head_dim {layer.head_dim} must be at most {MAX_HEAD_DIM}, "
                f"block_size {cache.block_size} a multiple of 16"
            )
        padded_head_dim = -(-layer.head_dim // 16) * 16
        blocks = (cache.num_blocks, layer.num_kv_heads)
        self._keys = torch.zeros(*blocks, layer.head_dim, cache.block_size, dtype=cache.dtype)
        self._values = torch.zeros(*blocks, cache.block_size, padded_head_dim, dtype=cache.dtype)
        self._layer = layer  # keeps alive what the structure points to
        self._structure = _Layer(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            block_size=cache.block_size,
            window=layer.sliding_window or 0,
            scale=1 / math.sqrt(layer.head_dim),
            eps=layer.eps,
            cos_sin=_pointer(layer.cos_sin),
            q_norm=_pointer(layer.q_norm),
            k_norm=_pointer(layer.k_norm),
            keys=self._keys.data_ptr(),
            values=self._values.data_ptr(),
        )
        self._native, self._dtype = native, DTYPES[cache.dtype]

    def __call__(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        _check(qkv)
        assert isinstance(plan, _Plan), "the plan was made by other kernels"
        result = qkv.new_empty(len(qkv), self._layer.num_heads * self._layer.head_dim)
        self._native.library.evenhand_attention(
            self._native.pool, self._structure, plan.structure, qkv.data_ptr(), result.data_ptr(), self._dtype
        )
        return result


class _Layer(ctypes.Structure):
    """`AttentionLayer` of attention.h."""

    _fields_ = (
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", "window")),
        *((name, c_float) for name in ("scale", "eps")),
        *((name, c_void_p) for name in ("cos_sin", "q_norm", "k_norm", "keys", "values")),
    )


class _Batch(ctypes.Structure):
    """`AttentionBatch` of attention.h."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_requests", "table_stride")),
        *((name, c_void_p) for name in ("positions", "slots", "block_table", "cu_seqlens_q")),
    )


@dataclass(frozen=True, slots=True)
class _Plan(AttentionPlan):
    structure: _Batch


_SIGNATURES = {
    "evenhand_new_pool": (c_void_p, [c_int]),
    "evenhand_delete_pool": (None, [c_void_p]),
    "evenhand_packed_size": (c_long, [c_long, c_long, c_int]),
    "evenhand_pack": (None, [c_void_p] * 3 + [c_int, c_long, c_long, c_int]),
    "evenhand_linear": (None, [c_void_p] * 5 + [c_int, c_long, c_long, c_long, c_int]),
    "evenhand_add_rms_norm": (None, [c_void_p] * 5 + [c_long, c_long, c_float]),
    "evenhand_attention": (
        None,
        [c_void_p, ctypes.POINTER(_Layer), ctypes.POINTER(_Batch), c_void_p, c_void_p, c_int],
    ),
}
"""Result and arguments of the functions in kernels.cpp."""


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(x: Tensor) -> None:
    assert x.dtype == torch.float32 and x.is_contiguous(), "C++ reads activations as contiguous float32"
