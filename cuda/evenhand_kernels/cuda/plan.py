"""Planner: cuts a step's attention into items of work that keep every multiprocessor busy until the end.

A unit is what a block of threads could do alone for one KV head: up to `prompt_rows` packed rows (query tokens times the
heads of a group) of one request against all tokens that these rows see. Units may be split along the tokens into equal
parts, which merge.cu puts together: as few as let all places of the device end together. Items go longest first: a place
that becomes free takes the next one, so the short ones fill the gaps (Graham's rule, SIAM J. Appl. Math. 17, 1969). All KV
heads have the same items; they are the other axis of the grid.

Pure, in numpy, without a loop over requests. What it takes is the number of numpy's calls, so what most decode steps have in
common with the step before is kept: the units but for their tokens, the splits that were tried, the numbers of parts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float32]

WORDS = 8
"""Of an item and of a merge: the structures in attention.cuh and merge.cu, field by field."""

REQUEST, HEAD_ROWS, FIRST_ROW, NUM_ROWS, BEGIN, END, PARTIAL_ROW, IS_PROMPT = range(WORDS)
NUM_PARTS = BEGIN

HEADER_WORDS = 8
"""Before the items: how many there are, how many merges."""

DECODE_ROWS = 16
"""Units of so few rows let the warps share the tokens instead of the rows: decode.cuh."""

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
_KEPT = 64
"""Of each thing that steps have in common: as many numbers of decodes take turns."""


class Capacity(NamedTuple):
    """What the work of any step of a certain size needs at most."""

    items: int
    merges: int

    @property
    def words(self) -> int:
        return HEADER_WORDS + WORDS * (self.items + self.merges)


@dataclass(frozen=True, slots=True)
class Work:
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
        return self._head_rows * self.num_kv_heads

    @property
    def _slots(self) -> int:
        """For each KV head."""
        return -(-self.num_slots // self.num_kv_heads)

    @property
    def _head_rows(self) -> int:
        return MAX_PART_UNITS * self._slots * self.prompt_rows

    def plan(self, seq_lens: Ints, cu_seqlens_q: Ints, window: int | None = None) -> Work:
        """The work of a step.

        Args:
            seq_lens: int32 [num_requests], tokens of each request up to and including this step's.
            cu_seqlens_q: int32 [num_requests + 1], the rows of each in the step; a request may have none.
            window: tokens that a query sees, itself included; None: all.
        """
        units, request, tokens_after, tokens_from = _units(
            cu_seqlens_q.tobytes(), self.group, self.prompt_rows, self._head_rows
        )
        units, seen = units.copy(), seq_lens.take(request)
        tokens = seen - tokens_after
        units[:, END] = tokens
        if window is not None:
            begin = np.maximum(seen - tokens_from - (window - 1), 0) // 16 * 16
            units[:, BEGIN] = begin
            tokens -= begin
        tiles = (tokens + (TILE - 1)) >> TILE_BITS
        if tiles.size and (longest := int(tiles.max())) * WAVES * self._slots > (total := int(tiles.sum())):
            split, lengths, parts = self._cuts(tiles, units[:, NUM_ROWS], longest, total)
            if len(split):
                return _split(units, split, lengths, parts)
        return Work(units.take((-tokens).argsort(), axis=0), _NO_MERGES)

    def _cuts(self, tiles: Ints, num_rows: Ints, longest: int, total: int) -> tuple[Longs, Floats, Floats]:
        """Which units are best cut, their tiles, and each into how many parts.

        All into parts of about one length, which is tried out: that of the longest unit in so many parts.
        """
        slots, share, most = self._slots, longest * self._slots // total, max(1, longest // LEAST_TILES)
        tried = {1, 2, 3, 4, 5, share, share + 1, 2 * share + 1, 3 * share + 1}
        counts = tuple(sorted([count for count in tried if 1 <= count <= most]))
        long = (tiles > longest // (2 * counts[-1])).nonzero()[0]  # others are whole, and shorter than half of any part
        lengths = tiles.take(long).astype(np.float32)  # exact, and divides several times as fast as an integer
        parts, num_long = _try(lengths.tobytes(), longest, counts)
        least = total / slots
        ends = [
            max(-(-num // slots) * -(-longest // count), least) for num, count in zip(num_long, counts, strict=True)
        ]
        while True:
            bound, best = min(ends) * (1 + TOLERANCE), 0
            while ends[best] > bound:
                best += 1
            num_parts = parts[best]
            cut = (num_parts > 1).nonzero()[0]
            split, num_parts = long.take(cut), num_parts.take(cut)
            if self._fit(num_parts, num_rows, split):
                return split, lengths.take(cut), num_parts
            ends[best] = math.inf

    def _fit(self, num_parts: Floats, num_rows: Ints, split: Longs) -> bool:
        """Whether there is memory for so many parts of these units."""
        total = sum(num_parts.tolist())
        if total <= MAX_PART_UNITS * self._slots:  # whatever their rows
            return True
        return bool(total <= MAX_PARTS * self._slots and num_parts @ num_rows.take(split) <= self._head_rows)


class _Units(NamedTuple):
    """Whole units as items, in the order of requests, but for their tokens.

    Attributes:
        units: int32 [num_units, 8].
        request: int64 [num_units].
        tokens_after: int32 [num_units], of the request, which no row of the unit sees.
        tokens_from: int32 [num_units], of the request, from the token of the unit's first row on.
    """

    units: Ints
    request: Longs
    tokens_after: Ints
    tokens_from: Ints


@lru_cache(_KEPT)
def _units(cu_seqlens_q: bytes, group: int, prompt_rows: int, head_rows: int) -> _Units:
    offsets = np.frombuffer(cu_seqlens_q, np.int32)
    lens = offsets[1:] - offsets[:-1]
    rows = lens * group
    if rows.size and rows.max() > prompt_rows:
        count = -(-rows // prompt_rows)
        request = np.arange(len(rows)).repeat(count)
        first_row = (np.arange(len(request)) - (count.cumsum() - count)[request]) * prompt_rows
        num_rows = np.minimum(rows[request] - first_row, prompt_rows)
        tokens_after = (lens[request] - (first_row + num_rows - 1) // group - 1).astype(np.int32)
        tokens_from = (lens[request] - first_row // group).astype(np.int32)
    else:  # one of each request that has rows
        request = rows.nonzero()[0]
        num_rows, tokens_from = rows.take(request), lens.take(request)
        first_row = tokens_after = np.zeros_like(num_rows)
    units = np.zeros((len(request), WORDS), np.int32)
    units[:, REQUEST] = request
    units[:, HEAD_ROWS] = head_rows
    units[:, FIRST_ROW] = first_row
    units[:, NUM_ROWS] = num_rows
    units[:, PARTIAL_ROW] = -1
    units[:, IS_PROMPT] = num_rows > DECODE_ROWS
    return _Units(units, request, tokens_after, tokens_from)


@lru_cache(_KEPT)
def _try(lengths: bytes, longest: int, counts: tuple[int, ...]) -> tuple[Floats, list[float]]:
    """Into how many parts units of these lengths are cut where the longest is cut into so many: [num_counts, num_units]; and
    how many parts then are longer than half of the longest, so that two of them do not fit a gap."""
    count = np.array(counts, np.float32)[:, None]
    half = np.array([-(-longest // count) // 2 for count in counts], np.float32)[:, None]
    tiles = np.frombuffer(lengths, np.float32)
    parts = np.ceil(tiles * count / longest)
    return parts, (parts * (tiles > parts * half)).sum(axis=1).tolist()


class _Parts(NamedTuple):
    """Of units that are split, one unit's after the other's.

    Attributes:
        unit, part: int64 [num_parts], whose part, and the how manyeth.
        first: int64 [num_units], the unit's first part.
        partial_row: int32 [num_parts].
    """

    unit: Longs
    part: Ints
    first: Longs
    partial_row: Ints


@lru_cache(_KEPT)
def _parts(num_parts: bytes, num_rows: bytes) -> _Parts:
    """Of units that have so many rows, int32, in so many parts, float32."""
    count, rows = np.frombuffer(num_parts, np.float32).astype(np.int64), np.frombuffer(num_rows, np.int32)
    unit, first = np.arange(len(count)).repeat(count), count.cumsum() - count
    row = rows[unit]
    part = (np.arange(len(unit)) - first[unit]).astype(np.int32)
    return _Parts(unit, part, first, (row.cumsum() - row).astype(np.int32))


def _split(units: Ints, split: Longs, tiles: Floats, parts: Floats) -> Work:
    """These units, of so many tiles, in parts of equal length, which begin at tiles; those at the end that this leaves empty
    are no parts.

    `take` copies rows several times as fast as an index does.
    """
    length = np.ceil(tiles / parts)
    num_parts = np.ceil(tiles / length)
    whole = units.take(split, axis=0)
    unit, part, first, partial_row = _parts(num_parts.tobytes(), whole[:, NUM_ROWS].tobytes())
    cut, size = whole.take(unit, axis=0), (length * TILE).astype(np.int32).take(unit)
    begin, end = cut[:, BEGIN], cut[:, END]
    begin += size * part
    np.minimum(begin + size, end, out=end)
    cut[:, PARTIAL_ROW] = partial_row
    merges = cut.take(first, axis=0)
    merges[:, NUM_PARTS] = num_parts
    units[split] = 0  # of no length, so that they go last
    items = np.concatenate((units, cut))
    order = (items[:, BEGIN] - items[:, END]).argsort()
    return Work(items.take(order[: len(items) - len(split)], axis=0), merges)
