"""CpuKernels: the kernels in C++, called through ctypes."""

import ctypes
import math
from ctypes import c_float, c_int, c_int32, c_int64, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from evenhand_kernels.cpu.library import load_library
from evenhand_kernels.kernels import Attention, AttentionBatch, AttentionLayer, KvCacheShape, Linear

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers that `kernels.cpp` dispatches on."""

MAX_HEAD_DIM = 256


class CpuKernels:
    """Implements `Kernels`. Uses as many threads as torch does when it is made."""

    name = "cpu"

    def __init__(self, cache_dir: Path) -> None:
        """Compiles the kernels into `cache_dir` if they are not there. Raises CompileError."""
        self._library = load_library(cache_dir)
        self._num_threads = torch.get_num_threads()
        self._library.evenhand_packed_size.argtypes = [c_long, c_long, c_int]
        self._library.evenhand_packed_size.restype = c_long
        for name, argument_types in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = argument_types, None

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return _Linear(self._library, weight, bias, gated=False, num_threads=self._num_threads)

    def gated_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return _Linear(self._library, weight, bias, gated=True, num_threads=self._num_threads)

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> Attention:
        return _Attention(self._library, layer, cache, self._num_threads)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(None, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x.data_ptr(), residual, weight, eps)

    def _norm(self, x: int | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        _check(residual)
        rows, size = residual.shape
        y = torch.empty_like(residual)
        self._library.evenhand_add_rms_norm(
            x, residual.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, size, eps, self._num_threads
        )
        return y


class _Linear:
    def __init__(
        self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None, *, gated: bool, num_threads: int
    ) -> None:
        self._shape = (*weight.shape, int(gated))
        self._out_features = len(weight) // 2 if gated else len(weight)
        self._dtype, self._num_threads, self._multiply = DTYPES[weight.dtype], num_threads, library.evenhand_linear
        self._packed = _packed(library, weight, gated, num_threads)
        self._bias = None if bias is None else _packed(library, bias.float()[:, None], gated, num_threads)
        self._pointers = (self._packed.data_ptr(), _pointer(self._bias))

    def __call__(self, x: Tensor) -> Tensor:
        _check(x)
        y = x.new_empty(len(x), self._out_features)
        self._multiply(
            x.data_ptr(), *self._pointers, y.data_ptr(), self._dtype, len(x), *self._shape, self._num_threads
        )
        return y


def _packed(library: ctypes.CDLL, weight: Tensor, gated: bool, num_threads: int) -> Tensor:
    """`weight`, [outputs, inputs], in the layout of linear.h."""
    weight = weight.contiguous()
    packed = weight.new_empty(library.evenhand_packed_size(*weight.shape, gated))
    library.evenhand_pack(weight.data_ptr(), packed.data_ptr(), DTYPES[weight.dtype], *weight.shape, gated, num_threads)
    return packed


class _Attention:
    def __init__(self, library: ctypes.CDLL, layer: AttentionLayer, cache: KvCacheShape, num_threads: int) -> None:
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
        self._attend, self._dtype, self._num_threads = library.evenhand_attention, DTYPES[cache.dtype], num_threads

    def __call__(self, qkv: Tensor, batch: AttentionBatch) -> Tensor:
        _check(qkv)
        result = qkv.new_empty(len(qkv), self._layer.num_heads * self._layer.head_dim)
        structure = _Batch(
            num_tokens=len(qkv),
            num_requests=len(batch.seq_lens),
            table_stride=batch.block_table.stride(0),
            positions=batch.positions.data_ptr(),
            slots=batch.slot_mapping.data_ptr(),
            block_table=batch.block_table.data_ptr(),
            cu_seqlens_q=batch.cu_seqlens_q.data_ptr(),
        )
        self._attend(self._structure, structure, qkv.data_ptr(), result.data_ptr(), self._dtype, self._num_threads)
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


_SIGNATURES = {
    "evenhand_pack": [c_void_p, c_void_p, c_int, c_long, c_long, c_int, c_int],
    "evenhand_linear": [c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_long, c_long, c_long, c_int, c_int],
    "evenhand_add_rms_norm": [c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_float, c_int],
    "evenhand_attention": [ctypes.POINTER(_Layer), ctypes.POINTER(_Batch), c_void_p, c_void_p, c_int, c_int],
}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(x: Tensor) -> None:
    assert x.dtype == torch.float32 and x.is_contiguous(), "C++ reads activations as contiguous float32"
