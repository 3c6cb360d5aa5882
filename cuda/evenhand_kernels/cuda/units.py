"""Units of a step's attention: what a block of threads could do alone for one KV head, as the planner cuts and orders them."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

WORDS = 8
"""Of an item and of a merge: the structures in attention.cuh and merge.cu, field by field."""

REQUEST, HEAD_ROWS, FIRST_ROW, NUM_ROWS, BEGIN, END, PARTIAL_ROW, IS_PROMPT = range(WORDS)
NUM_PARTS = BEGIN

DECODE_ROWS = 16
"""Units of so few rows let the warps share the tokens instead of the rows: decode.cuh."""

KEPT = 64
"""Of each thing that steps have in common: as many numbers of requests take turns."""

NUMBERS = np.arange(1 << 20, dtype=np.int32)
"""More than a step has tokens, or parts."""


def are_decodes(cu_seqlens_q: Ints, num_tokens: int) -> bool:
    """Whether the first `num_tokens` requests have a row each, so that the others have none."""
    return cu_seqlens_q[: num_tokens + 1].tobytes() == NUMBERS[: num_tokens + 1].tobytes()


@lru_cache(KEPT)
def decodes(count: int, group: int, head_rows: int) -> Ints:
    """int32 [count, 8]: whole units of so many requests with a row each, but for their tokens."""
    units = np.zeros((count, WORDS), np.int32)
    units[:, REQUEST] = np.arange(count)
    units[:, HEAD_ROWS] = head_rows
    units[:, NUM_ROWS] = group
    units[:, PARTIAL_ROW] = -1
    units[:, IS_PROMPT] = group > DECODE_ROWS
    return units


class Units(NamedTuple):
    """Whole units as items, in the order of requests, but for their tokens.

    Attributes:
        units: int32 [num_units, 8].
        request: int32 [num_units].
        tokens_after: int32 [num_units], of the request, which no row of the unit sees.
        tokens_from: int32 [num_units], of the request, from the token of the unit's first row on.
    """

    units: Ints
    request: Ints
    tokens_after: Ints
    tokens_from: Ints


@lru_cache(KEPT)
def units_of(cu_seqlens_q: bytes, group: int, prompt_rows: int, head_rows: int) -> Units:
    """Up to `prompt_rows` packed rows of one request each. Of a step whose `cu_seqlens_q` has these bytes, for `group` query heads of a
    KV head, and `head_rows` partial rows."""
    offsets = np.frombuffer(cu_seqlens_q, np.int32)
    lens = offsets[1:] - offsets[:-1]
    rows = lens * group
    count = -(-rows // prompt_rows)
    first = np.add.accumulate(count, dtype=np.int32) - count
    request, lens = NUMBERS[: len(lens)].repeat(count), lens.repeat(count)
    first_row = (NUMBERS[: len(request)] - first.repeat(count)) * prompt_rows
    num_rows = np.minimum(lens * group - first_row, prompt_rows)
    units = np.zeros((len(request), WORDS), np.int32)
    units[:, REQUEST] = request
    units[:, HEAD_ROWS] = head_rows
    units[:, FIRST_ROW] = first_row
    units[:, NUM_ROWS] = num_rows
    units[:, PARTIAL_ROW] = -1
    units[:, IS_PROMPT] = num_rows > DECODE_ROWS
    tokens_after = lens - (first_row + num_rows - 1) // group - 1
    return Units(units, request, tokens_after, lens - first_row // group)
