"""Tokens of rows of logits, and how likely they were: sample.h and log_probabilities.h. Logits are float32, contiguous."""

import ctypes
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from evenhand_kernels.cpu.native import DrawStructure, Native
from evenhand_kernels.kernels import Draw, LogProbabilities


def draw(native: Native, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """See `Kernels.draw`."""
    token_ids = (ctypes.c_int32 * len(draws))()
    structures = (DrawStructure * len(draws))(*map(_structure, draws))
    native.library.evenhand_draw(native.pool, logits.data_ptr(), *logits.shape, structures, token_ids)
    return [None if token_id < 0 else token_id for token_id in token_ids]


def _structure(draw: Draw) -> DrawStructure:
    """Valid for as long as `draw` is."""
    *numbers, allowed = draw
    return DrawStructure(*numbers, None if allowed is None else allowed.ctypes.data)


def log_probabilities(native: Native, logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
    """See `Kernels.log_probabilities`."""
    num_top = min(num_top, logits.shape[1])
    tokens, found = np.array(token_ids, np.int32), LogProbabilities.empty(len(logits), num_top)
    memory = (tokens.ctypes.data, num_top, *(part.ctypes.data for part in found))
    native.library.evenhand_log_probabilities(native.pool, logits.data_ptr(), *logits.shape, *memory)
    return found
