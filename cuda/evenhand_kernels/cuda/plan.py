"""Planner: cuts a step's attention into items of work that keep every multiprocessor busy until the end.

A unit is what a block of threads could do alone for one KV head: up to `prompt_rows` packed rows (query tokens times the
heads of a group) of one request against all tokens that these rows see. Units may be split along the tokens into equal
parts, which merge.cu puts together: as few as let all places of the device end together. Items go longest first: a place
that becomes free takes the next one, so the short ones fill the gaps (Graham's rule, SIAM J. Appl. Math. 17, 1969). All KV
heads have the same items; they are the other axis of the grid.

Pure, in numpy, without a loop over requests. What it takes is the number of numpy's calls. So units are sorted first: those that are
cut then are the first ones, and no index of them is needed; and what most decode steps have in common with the step before is
kept: the units but for their tokens, the splits that were tried, the parts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evenhand_kernels.cuda.units import (
    BEGIN,
    END,
    KEPT,
    NUM_PARTS,
    NUM_ROWS,
    NUMBERS,
    PARTIAL_ROW,
    WORDS,
    Ints,
    are_decodes,
    decodes,
    units_of,
)

Longs = NDArray[np.int64]
Floats = NDArray[np.float64]

HEADER_WORDS = 8
"""Before the items: how many there are, how many merges."""

TILE_BITS = 6
TILE = 1 << TILE_BITS
"""Tokens; costs are counted in tiles, and parts of a split begin at tiles."""

LEAST_TILES = 4
"""Of a part: below this, merging costs more than the reading."""

TOLERANCE = 1 / 16
"""What fewer parts may cost of the time that the best split takes."""

MAX_PARTS, MAX_PART_UNITS = 8, 2
"""For each place, so many parts at most, and so many times the rows of the largest unit: the memory that parts take."""

WAVES = 4
"""Where the longest unit is this much shorter than what each place has to do, the order alone evens out the ends."""

_NO_MERGES = np.empty((0, WORDS), np.int32)


class Capacity(NamedTuple):
    """What the work of any step of a certain size needs at most."""

    items: int
    merges: int

    @property
    def words(self) -> int:
        return HEADER_WORDS + WORDS * (self.items + self.merges)


class Work(NamedTuple):
    """The work of one step for the layers of one window.

    Attributes:
        items: int32 [num_items, 8], fields as `Item` in attention.cuh.
        merges: int32 [num_merges, 8], fields as `Merge` in merge.cu.
    """

    items: Ints
    merges: Ints

    def write(self, words: Ints, capacity: Capacity) -> None:
        """Lay out header, items and merges as the kernels read them; `words` is int32 [capacity.words]."""
        num_items, num_merges = len(self.items), len(self.merges)
        words[0], words[1] = num_items, num_merges
        words[HEADER_WORDS : HEADER_WORDS + num_items * WORDS] = self.items.reshape(-1)
        start = HEADER_WORDS + capacity.items * WORDS
        words[start : start + num_merges * WORDS] = self.merges.reshape(-1)


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans for one model on one device.

    Attributes:
        group: query heads of a KV head.
        prompt_rows: rows of the largest unit.
        num_slots: blocks of the attention kernel that run at once on the whole device.
    """

    num_kv_heads: int
    group: int
    prompt_rows: int
    num_slots: int

    def capacity(self, num_requests: int, num_tokens: int) -> Capacity:
        """Enough for any step of so many requests and tokens."""
        units = num_requests + num_tokens * self.group // self.prompt_rows
        parts = MAX_PARTS * self._slots
        return Capacity(units + parts, parts)

    @property
    def max_partial_rows(self) -> int:
        """Enough for any step."""
        return MAX_PART_UNITS * self._slots * self.prompt_rows * self.num_kv_heads

    @property
    def _slots(self) -> int:
        """For each KV head."""
        return -(-self.num_slots // self.num_kv_heads)

    def plan(self, seq_lens: Ints, cu_seqlens_q: Ints, window: int | None = None) -> Work:
        """The work of a step.

        Args:
            seq_lens: int32 [num_requests], tokens of each request up to and including this step's.
            cu_seqlens_q: int32 [num_requests + 1], the rows of each in the step; a request may have none.
            window: tokens that a query sees, itself included; None: all.
        """
        tokens_from: Ints | int
        num_tokens, slots = int(cu_seqlens_q[-1]), self._slots
        head_rows = MAX_PART_UNITS * slots * self.prompt_rows
        if self.group <= self.prompt_rows and are_decodes(cu_seqlens_q, num_tokens):
            units = decodes(1 << num_tokens.bit_length(), self.group, head_rows)[:num_tokens].copy()
            seen = tokens = seq_lens[:num_tokens]
            tokens_from, most_rows = 1, self.group
        else:
            known = units_of(cu_seqlens_q.tobytes(), self.group, self.prompt_rows, head_rows)
            units, seen, tokens_from = known.units.copy(), seq_lens.take(known.request), known.tokens_from
            tokens, most_rows = seen - known.tokens_after, self.prompt_rows
        units[:, END] = tokens
        if window is not None:
            units[:, BEGIN] = begin = np.maximum(seen - tokens_from - (window - 1), 0) // 16 * 16
            tokens = tokens - begin
        tiles = (tokens + (TILE - 1)) >> TILE_BITS
        order = _longest_first(tiles)
        units, tiles = units.take(order, axis=0), tiles.take(order)
        if len(tiles) and int(tiles[0]) * WAVES * slots > (total := int(np.add.reduce(tiles))):
            parts = _parts(tiles, total, slots, _Memory(units, most_rows, MAX_PARTS * slots, head_rows))
            if len(parts):
                return _split(units, tiles[: len(parts)], parts)
        return Work(units, _NO_MERGES)


def _longest_first(tiles: Ints) -> Longs:
    """The order of items of so many tiles each, up to 65,535. A sort by the digits of 16 bits takes half of what one by size does."""
    return (0xFFFF - tiles).astype(np.uint16).argsort(kind="stable")


class _Memory(NamedTuple):
    """What parts have room in: so many, of so many rows together. `most_rows`: no unit has more."""

    units: Ints
    most_rows: int
    parts: int
    rows: int

    def fits(self, num_parts: Floats) -> bool:
        """Whether so many parts of the first units do."""
        total = float(np.add.reduce(num_parts))
        if total * self.most_rows <= self.rows:
            return total <= self.parts
        return total <= self.parts and float(num_parts @ self.units[: len(num_parts), NUM_ROWS]) <= self.rows


def _parts(tiles: Ints, total: int, slots: int, memory: _Memory) -> Floats:
    """Into how many parts the first of the units, of so many tiles, longest first, are best cut; the others stay whole.

    All into parts of about one length, which is tried out: that of the longest unit in so many parts.
    """
    longest = int(tiles[0])
    share = longest * slots // total
    most = min(max(1, longest // LEAST_TILES), max(5, 3 * share + 1))
    # the others are shorter than half of any part
    long = tiles[: np.count_nonzero(tiles > longest // (2 * most))]
    parts, ends = _try(long.tobytes(), share, most, slots)
    least = total / slots
    ends = [max(end, least) for end in ends]
    while True:
        bound, best = min(ends) * (1 + TOLERANCE), 0
        while ends[best] > bound:
            best += 1
        num_parts: Floats = parts[best][: np.count_nonzero(parts[best] > 1)]
        if memory.fits(num_parts):
            return num_parts
        ends[best] = math.inf


@lru_cache(KEPT)
def _counts(share: int, most: int) -> Floats:
    """float64 [num_counts, 1]: into how many parts, up to `most`, to cut the longest unit, which is `share` times what each place has
    to do."""
    tried = {1, 2, 3, 4, 5, share, share + 1, 2 * share + 1, 3 * share + 1}
    return np.array(sorted(count for count in tried if 1 <= count <= most), np.float64)[:, None]


@lru_cache(KEPT)
def _try(tiles: bytes, share: int, most: int, slots: int) -> tuple[Floats, list[float]]:
    """Into how many parts units of so many tiles, longest first, are cut where the first is cut into each of `_counts`: [num_counts,
    num_units]; and when the last part ends where so many places take one after the other, in tiles."""
    units, counts = np.frombuffer(tiles, np.int32), _counts(share, most)
    longest, scaled = int(units[0]), units * counts  # floats, exact here, divide several times as fast as integers
    parts = np.ceil(scaled / longest)
    # what is no longer than half of the longest part fits a gap beside another
    num_long = np.add.reduce(parts, axis=1, where=scaled > longest / 2)
    return parts, (np.ceil(num_long / slots) * np.ceil(longest / counts)[:, 0]).tolist()


class _Cuts(NamedTuple):
    """How units are cut.

    Attributes:
        num_parts, first: int32 [num_units], of each unit, and the first of them among all.
        size, offset, partial_row: int32 [num_parts], tokens of a part, where in its unit it begins, and its first row in memory.
    """

    num_parts: Ints
    first: Ints
    size: Ints
    offset: Ints
    partial_row: Ints


@lru_cache(KEPT)
def _cuts(tiles: bytes, parts: bytes, num_rows: bytes) -> _Cuts:
    """Of units of so many tiles and rows, into parts of equal length, which begin at tiles; those at the end that this leaves
    empty are no parts."""
    units = np.frombuffer(tiles, np.int32)
    length = np.ceil(units / np.frombuffer(parts, np.float64))
    num_parts = np.ceil(units / length).astype(np.int32)
    first = np.add.accumulate(num_parts, dtype=np.int32) - num_parts
    size, rows = (length * TILE).astype(np.int32).repeat(num_parts), np.frombuffer(num_rows, np.int32).repeat(num_parts)
    offset = size * (NUMBERS[: len(size)] - first.repeat(num_parts))
    return _Cuts(num_parts, first, size, offset, np.add.accumulate(rows, dtype=np.int32) - rows)


def _split(units: Ints, tiles: Ints, parts: Floats) -> Work:
    """The first of these units, of so many tiles, in so many parts or fewer."""
    whole = units[: len(tiles)]
    num_parts, first, size, offset, partial_row = _cuts(tiles.tobytes(), parts.tobytes(), whole[:, NUM_ROWS].tobytes())
    cut = whole.repeat(num_parts, axis=0)
    begin, end = cut[:, BEGIN], cut[:, END]
    begin += offset
    np.minimum(begin + size, end, out=end)
    cut[:, PARTIAL_ROW] = partial_row
    merges = cut.take(first, axis=0)
    merges[:, NUM_PARTS] = num_parts
    items = np.concatenate((cut, units[len(tiles) :]))
    order = _longest_first((items[:, END] - items[:, BEGIN] + (TILE - 1)) >> TILE_BITS)
    return Work(items.take(order, axis=0), merges)
