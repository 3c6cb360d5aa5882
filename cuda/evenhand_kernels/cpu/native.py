"""The compiled kernels as Python sees them: the structures of their headers, their functions, their threads and memory."""

import ctypes
import math
import mmap
import weakref
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from evenhand_kernels.cpu.library import load_library

ALIGNMENT = 64
CHUNK_BYTES = 32 << 20
"""Memory that is asked for at once; what is not used of it is never touched."""


class WeightStructure(ctypes.Structure):
    """`Weight` of linear.h."""

    _fields_ = (
        *((name, c_int64) for name in ("outputs", "inputs")),
        *((name, c_int32) for name in ("format", "group", "gated", "tiled", "activations")),
        *((name, c_void_p) for name in ("packed", "bias")),
    )


class PartsStructure(ctypes.Structure):
    """`Parts` of weight.h."""

    _fields_ = tuple((name, c_void_p) for name in ("codes", "scales", "minima", "factors"))


class AttentionStructure(ctypes.Structure):
    """`AttentionLayer` of attention.h."""

    _fields_ = (
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", "window")),
        *((name, c_int32) for name in ("cache_dtype", "tiled")),
        *((name, c_float) for name in ("scale", "eps")),
        *((name, c_void_p) for name in ("cos_sin", "q_norm", "k_norm", "keys", "values")),
    )


class BatchStructure(ctypes.Structure):
    """`AttentionBatch` of attention.h."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_requests", "table_stride")),
        *((name, c_void_p) for name in ("positions", "slots", "block_table", "cu_seqlens_q")),
    )


class LayerStructure(ctypes.Structure):
    """`DecoderLayer` of decoder.h."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in ("input_norm", "qkv", "attention", "output", "post_attention_norm", "gate_up", "down")
    )


class DecoderStructure(ctypes.Structure):
    """`Decoder` of decoder.h."""

    _fields_ = (
        ("num_layers", c_int64),
        *((name, c_void_p) for name in ("layers", "embedding", "norm", "lm_head")),
        ("eps", c_float),
    )


_SIGNATURES = {
    "evenhand_new_pool": (c_void_p, [c_int]),
    "evenhand_delete_pool": (None, [c_void_p]),
    "evenhand_prefer_huge_pages": (None, [c_void_p, c_long]),
    "evenhand_has_products": (c_int, [c_int32]),
    "evenhand_has_tiles": (c_int, []),
    "evenhand_prefers_integers": (c_int, []),
    "evenhand_packed_bytes": (c_long, [POINTER(WeightStructure)]),
    "evenhand_pack": (None, [c_void_p, POINTER(WeightStructure), POINTER(PartsStructure)]),
    "evenhand_linear": (None, [c_void_p, POINTER(WeightStructure), c_void_p, c_void_p, c_long]),
    "evenhand_embedding": (None, [c_void_p, POINTER(WeightStructure), c_void_p, c_void_p, c_long]),
    "evenhand_add_rms_norm": (None, [c_void_p] * 5 + [c_long, c_long, c_float]),
    "evenhand_attention": (
        None,
        [c_void_p, POINTER(AttentionStructure), POINTER(BatchStructure), c_void_p, c_void_p],
    ),
    "evenhand_draw": (None, [c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p]),
    "evenhand_log_probabilities": (None, [c_void_p, c_void_p, c_long, c_long, c_void_p, c_long, *[c_void_p] * 4]),
    "evenhand_activation_floats": (c_long, [POINTER(DecoderStructure)]),
    "evenhand_forward": (
        None,
        [c_void_p, POINTER(DecoderStructure), POINTER(BatchStructure), c_void_p, c_void_p, c_long, c_void_p, c_void_p],
    ),
}
"""Result and arguments of the functions in kernels.cpp."""


class Native:
    """The compiled library, and threads that end when nothing needs them any more."""

    def __init__(self, cache_dir: Path, num_threads: int) -> None:
        self.library = load_library(cache_dir)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.pool = self.library.evenhand_new_pool(num_threads)
        weakref.finalize(self, self.library.evenhand_delete_pool, self.pool).atexit = False
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory for a weight, next to that of others: a huge page holds several."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._chunk):
            self._chunk = torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8)
            self.prefer_huge_pages(self._chunk)
        memory, self._chunk = self._chunk[:num_bytes], self._chunk[size:]
        return memory

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a KV cache, which is taken from the system only as it is used: torch.zeros would write to all of it."""
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        memory = torch.frombuffer(pages, dtype=dtype)
        self.prefer_huge_pages(memory)
        return memory.view(shape)

    def prefer_huge_pages(self, memory: Tensor) -> None:
        self.library.evenhand_prefer_huge_pages(memory.data_ptr(), memory.nbytes)
