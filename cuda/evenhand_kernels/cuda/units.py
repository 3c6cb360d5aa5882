"""Units of a step's attention: what a block of threads could do alone for one KV head, as the planner cuts and orders them."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

WORDS = 8
"""Of an item and of a merge: the structures in attention.cuh and merge.cu, field by field."""

REQUEST, HEAD_ROWS, FIRST_ROW, NUM_ROWS, BEGIN, END, PARTIAL_ROW, IS_PROMPT = range(WORDS)
NUM_PARTS = BEGIN

DECODE_ROWS = 16
"""Units of so few rows let the warps share the tokens instead of the rows: decode.cuh."""

SLICE = 16
"""Tokens: where a unit begins, is a multiple."""


def make_units(seq_lens: Ints, cu_seqlens_q: Ints, group: int, prompt_rows: int, window: int | None) -> Ints:
    """int32 [num_units, 8]: whole units as items, in the order of requests, without HEAD_ROWS.

    Up to `prompt_rows` packed rows of one request each, for `group` query heads of a KV head. The arguments are those of `Planner.plan`.
    """
    num_new = np.diff(cu_seqlens_q)
    count = -(-num_new * group // prompt_rows)
    request = np.arange(len(seq_lens), dtype=np.int32).repeat(count)
    first_row = (np.arange(len(request)) - (count.cumsum() - count).repeat(count)) * prompt_rows
    num_rows = np.minimum((num_new * group)[request] - first_row, prompt_rows)
    past = (seq_lens - num_new)[request]
    units = np.zeros((len(request), WORDS), np.int32)
    units[:, REQUEST] = request
    units[:, FIRST_ROW] = first_row
    units[:, NUM_ROWS] = num_rows
    if window is not None:
        units[:, BEGIN] = np.maximum(past + first_row // group + 1 - window, 0) // SLICE * SLICE
    units[:, END] = past + (first_row + num_rows - 1) // group + 1
    units[:, PARTIAL_ROW] = -1
    units[:, IS_PROMPT] = num_rows > DECODE_ROWS
    return units
