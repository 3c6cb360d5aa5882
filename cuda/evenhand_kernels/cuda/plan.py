"""Planner: cuts a step's attention into items of work that keep every multiprocessor busy until the end.

A unit is what a block of threads could do alone for one KV head: up to `prompt_rows` packed rows (query tokens times the
heads of a group) of one request against all tokens that these rows see. Units may be split along the tokens into equal
parts, which merge.cu puts together: as few as let all places of the device end together. Items go longest first: a place
that becomes free takes the next one, so the short ones fill the gaps (Graham's rule, SIAM J. Appl. Math. 17, 1969). All KV
heads have the same items; they are the other axis of the grid.

Pure, in numpy, without a loop over requests.
"""

import math
from dataclasses import dataclass
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
        num_partial_rows: rows of the buffers that parts of splits are left in.
    """

    items: Ints
    merges: Ints
    num_partial_rows: int

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
        units = self._units(seq_lens, cu_seqlens_q, window)
        tokens = units[:, END] if window is None else units[:, END] - units[:, BEGIN]
        tiles = (tokens + (TILE - 1)) >> TILE_BITS
        if tiles.size and (longest := int(tiles.max())) * WAVES * self._slots > (total := int(tiles.sum())):
            split, lengths, parts = self._parts(tiles, units[:, NUM_ROWS], longest, total)
            if len(split):
                return self._split(units, split, lengths, parts)
        return Work(units.take((-tokens).argsort(), axis=0), _NO_MERGES, 0)

    def _parts(self, tiles: Ints, num_rows: Ints, longest: int, total: int) -> tuple[Longs, Floats, Floats]:
        """Which units are best cut, their tiles, and each into how many parts.

        All into parts of about one length, which is tried out: that of the longest unit in so many parts.
        """
        slots, share = self._slots, longest * self._slots // total
        tried = {1, 2, 3, 4, 5, share, share + 1, 2 * share + 1, 3 * share + 1}
        counts = sorted([count for count in tried if 1 <= count <= max(1, longest // LEAST_TILES)])
        long = (tiles > longest // (2 * counts[-1])).nonzero()[0]  # others are whole, and shorter than half of any part
        lengths = tiles.take(long).astype(np.float32)  # exact, and divides several times as fast as an integer
        longest_parts = [-(-longest // count) for count in counts]
        halves = [length // 2 for length in longest_parts]
        count, half = np.array(counts + halves, np.float32).reshape(2, -1, 1)
        parts = np.ceil(lengths * count / longest)
        are_long = lengths > parts * half  # longer than half of the longest: two of them do not fit a gap
        num_long = (parts * are_long).sum(axis=1).tolist()
        least = total / slots
        ends = [max(-(-num // slots) * length, least) for num, length in zip(num_long, longest_parts, strict=True)]
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

    def _units(self, seq_lens: Ints, cu_seqlens_q: Ints, window: int | None) -> Ints:
        """Whole units as items, in the order of requests."""
        lens = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
        past, rows = seq_lens - lens, lens * self.group
        if rows.size and lens.min() > 0 and (cu_seqlens_q[-1] == len(lens) or rows.max() <= self.prompt_rows):
            units = np.zeros((len(rows), WORDS), np.int32)  # one for each request
            units[:, REQUEST] = np.arange(len(rows), dtype=np.int32)
            units[:, END] = seq_lens
        else:
            count = -(-rows // self.prompt_rows)
            request = np.repeat(np.arange(len(rows)), count)
            first_row = (np.arange(len(request)) - np.repeat(count.cumsum() - count, count)) * self.prompt_rows
            past = past[request]
            units = np.zeros((len(request), WORDS), np.int32)
            units[:, REQUEST] = request
            units[:, FIRST_ROW] = first_row
            rows = np.minimum(rows[request] - first_row, self.prompt_rows)
            units[:, END] = past + (first_row + rows - 1) // self.group + 1
        units[:, NUM_ROWS] = rows
        units[:, IS_PROMPT] = rows > DECODE_ROWS
        units[:, PARTIAL_ROW] = -1
        if window is not None:
            first_token = past + units[:, FIRST_ROW] // self.group - (window - 1)
            units[:, BEGIN] = np.maximum(first_token, 0) // 16 * 16
        return units

    def _split(self, units: Ints, split: Longs, tiles: Floats, parts: Floats) -> Work:
        """These units, of so many tiles, in parts of equal length, which begin at tiles; those at the end that this leaves
        empty are no parts.

        The last part stays where the unit was. `take` copies rows several times as fast as an index does.
        """
        length = np.ceil(tiles / parts)
        num_parts, size = np.ceil(tiles / length).astype(np.int32), (length * TILE).astype(np.int32)
        more = num_parts - 1  # parts before the last
        merges = units.take(split, axis=0)
        num_rows = merges[:, NUM_ROWS]
        rows = num_parts * num_rows
        ends = rows.cumsum(dtype=np.int32) * self.num_kv_heads
        merges[:, HEAD_ROWS] = rows
        merges[0, PARTIAL_ROW], merges[1:, PARTIAL_ROW] = 0, ends[:-1]

        step = np.zeros((len(split), WORDS), np.int32)  # from a part to the next
        step[:, BEGIN], step[:, PARTIAL_ROW] = size, num_rows
        units[split] = merges + step * more[:, None]
        unit = np.arange(len(more)).repeat(more)
        part = np.arange(len(unit), dtype=np.int32) - (more.cumsum(dtype=np.int32) - more).take(unit)
        others = merges.take(unit, axis=0) + step.take(unit, axis=0) * part[:, None]
        others[:, END] = others[:, BEGIN] + size.take(unit)
        merges[:, NUM_PARTS] = num_parts
        items = np.concatenate((units, others))
        return Work(items.take((items[:, BEGIN] - items[:, END]).argsort(), axis=0), merges, int(ends[-1]))
