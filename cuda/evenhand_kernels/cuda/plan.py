"""Planner: cuts a step's attention into items of work that keep every multiprocessor busy until the end.

A unit is what a block of threads could do alone for one KV head: up to `prompt_rows` packed rows (query tokens times the
heads of a group) of one request against all tokens that these rows see. Units may be split along the tokens into equal
parts, which merge.cu puts together: as few as let all places of the device end together. Items go longest first: a place
that becomes free takes the next one, so the short ones fill the gaps (Graham's rule, SIAM J. Appl. Math. 17, 1969). All KV
heads have the same items; they are the other axis of the grid.

Pure, in numpy, without a loop over requests. cpu/plan.cpp makes the same plan in a tenth of the time, where it can be compiled
(`native_plan.py`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evenhand_kernels.cuda.units import BEGIN, END, HEAD_ROWS, NUM_PARTS, NUM_ROWS, PARTIAL_ROW, WORDS, Ints, make_units

Longs = NDArray[np.int64]

HEADER_WORDS = 8
"""Before the items: how many there are, how many merges."""

TILE = 64
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


class Counts(NamedTuple):
    """Of a step's work for the layers of one window."""

    items: int
    merges: int


class Work(NamedTuple):
    """The work of one step for the layers of one window.

    Attributes:
        items: int32 [num_items, 8], fields as `Item` in attention.cuh.
        merges: int32 [num_merges, 8], fields as `Merge` in merge.cu.
    """

    items: Ints
    merges: Ints


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
        return Capacity(units + self.max_parts, self.max_parts)

    @property
    def max_partial_rows(self) -> int:
        """Enough for any step."""
        return self.head_rows * self.num_kv_heads

    @property
    def slots(self) -> int:
        """For each KV head, as are the next two."""
        return -(-self.num_slots // self.num_kv_heads)

    @property
    def max_parts(self) -> int:
        return MAX_PARTS * self.slots

    @property
    def head_rows(self) -> int:
        """Of parts, in memory."""
        return MAX_PART_UNITS * self.slots * self.prompt_rows

    def plan(self, seq_lens: Ints, cu_seqlens_q: Ints, window: int | None = None) -> Work:
        """The work of a step.

        Args:
            seq_lens: int32 [num_requests], tokens of each request up to and including this step's.
            cu_seqlens_q: int32 [num_requests + 1], the rows of each in the step; a request may have none.
            window: tokens that a query sees, itself included; None: all.
        """
        units = make_units(seq_lens, cu_seqlens_q, self.group, self.prompt_rows, window)
        units[:, HEAD_ROWS] = self.head_rows
        units = units[_longest_first(units)]
        tiles = _tiles(units)
        if len(units) == 0 or tiles[0] * WAVES * self.slots <= tiles.sum():
            return Work(units, _NO_MERGES)
        num_parts = self._num_parts(units, tiles)
        return _split(units, tiles[: len(num_parts)], num_parts)

    def write(
        self, words: Ints, capacity: Capacity, seq_lens: Ints, cu_seqlens_q: Ints, window: int | None = None
    ) -> Counts:
        """Lay out header, items and merges of `plan` as the kernels read them; `words` is int32 [capacity.words]."""
        items, merges = self.plan(seq_lens, cu_seqlens_q, window)
        words[0], words[1] = counts = Counts(len(items), len(merges))
        words[HEADER_WORDS : HEADER_WORDS + items.size] = items.reshape(-1)
        start = HEADER_WORDS + capacity.items * WORDS
        words[start : start + merges.size] = merges.reshape(-1)
        return counts

    def _num_parts(self, units: Ints, tiles: Longs) -> Longs:
        """Into how many parts the first of the units, of so many tiles, longest first, are best cut; the others stay whole.

        All into parts of about one length, which is tried out: that of the longest unit in so many parts.
        """
        longest, total = int(tiles[0]), int(tiles.sum())
        share = longest * self.slots // total  # of the longest unit in what each place has to do
        most = min(max(1, longest // LEAST_TILES), max(5, 3 * share + 1))
        tried = {1, 2, 3, 4, 5, share, share + 1, 2 * share + 1, 3 * share + 1}
        counts = np.array(sorted(count for count in tried if 1 <= count <= most))[:, None]
        parts = -(-tiles * counts // longest)
        # what is no longer than half of the longest part fits a gap beside another
        num_long = np.where(2 * tiles * counts > longest, parts, 0).sum(axis=1)
        # when the last part ends where all places take one after the other, in tiles
        ends = np.maximum(-(-num_long // self.slots) * -(-longest // counts[:, 0]), total / self.slots)
        cut = np.where(parts > 1, parts, 0)
        ends[(cut.sum(axis=1) > self.max_parts) | (cut @ units[:, NUM_ROWS] > self.head_rows)] = np.inf
        best = int(np.argmax(ends <= ends.min() * (1 + TOLERANCE)))
        num_parts: Longs = parts[best, : np.count_nonzero(cut[best])]
        return num_parts


def _tiles(items: Ints) -> Longs:
    """int64 [num_items]."""
    return -(-(items[:, END] - items[:, BEGIN]).astype(np.int64) // TILE)


def _longest_first(items: Ints) -> Longs:
    """Their order; those of as many tiles stay in theirs."""
    return (-_tiles(items)).argsort(kind="stable")


def _split(units: Ints, tiles: Longs, parts: Longs) -> Work:
    """The first of these units, of so many tiles, in so many parts of equal length or fewer, which begin at tiles; those at the end that
    this leaves empty are no parts."""
    length = -(-tiles // parts)
    num_parts = -(-tiles // length)
    first = num_parts.cumsum() - num_parts
    size = (length * TILE).repeat(num_parts)
    cut = units[: len(tiles)].repeat(num_parts, axis=0)
    cut[:, BEGIN] += (size * (np.arange(len(cut)) - first.repeat(num_parts))).astype(np.int32)
    cut[:, END] = np.minimum(cut[:, BEGIN] + size, cut[:, END])
    cut[:, PARTIAL_ROW] = cut[:, NUM_ROWS].cumsum() - cut[:, NUM_ROWS]
    merges = cut[first]
    merges[:, NUM_PARTS] = num_parts
    items = np.concatenate((cut, units[len(tiles) :]))
    return Work(items[_longest_first(items)], merges)
