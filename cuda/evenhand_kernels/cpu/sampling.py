"""Tokens of rows of logits, and how likely they were: sample.h and log_probabilities.h. Logits are float32, contiguous."""

import ctypes
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.cpu.native import Native
from evenhand_kernels.kernels import Draw, LogProbabilities

_DRAW = struct.Struct("@ffiQQP")
"""`Draw` of sample.h."""


def draw(native: Native, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """See `Kernels.draw`."""
    token_ids = (ctypes.c_int32 * len(draws))()
    packed = b"".join([_DRAW.pack(*numbers, _address(allowed)) for *numbers, allowed in draws])
    native.library.evenhand_draw(native.pool, logits.data_ptr(), *logits.shape, packed, token_ids)
    return [None if token_id < 0 else token_id for token_id in token_ids]


def _address(mask: NDArray[np.int32] | None) -> int:
    """Valid for as long as `mask` is."""
    return 0 if mask is None else mask.ctypes.data


def log_probabilities(native: Native, logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
    """See `Kernels.log_probabilities`."""
    num_top = min(num_top, logits.shape[1])
    tokens, found = np.array(token_ids, np.int32), LogProbabilities.empty(len(logits), num_top)
    memory = (tokens.ctypes.data, num_top, *(part.ctypes.data for part in found))
    native.library.evenhand_log_probabilities(native.pool, logits.data_ptr(), *logits.shape, *memory)
    return found
