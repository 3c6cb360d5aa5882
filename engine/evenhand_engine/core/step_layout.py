"""StepLayout: where each part of a step lies in the one block of memory that goes to the device.

A step takes one copy: the host writes all parts, one after the other, into pinned memory, and one transfer puts them into
device memory at the same offsets. A recorded graph reads them there, so its layout must be the same for all its steps: that
of its padded size.

    rows │ requests │ samples │ attention's plan │ new blocks
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.cuda.sampling import SamplingRows

Words = NDArray[np.int32]

BY_SEAT = ("temperature", "top_p", "min_p", "top_k")
"""Parts that lie one after the other, each with a word for each sample that its seat alone decides."""

_ALIGNMENT = 4  # words: 16 bytes, so that kernels may read vectors
_WORDS_PER_NEW_BLOCK = 3  # its place, an int64, and the block


@dataclass(frozen=True)
class StepLayout:
    """Sizes of a step's parts. What the step adds to block tables lies behind them, and is not part of a graph.

    Attributes:
        num_rows: tokens, padding included.
        num_requests: requests, padding included.
        num_samples: rows of logits that are sampled.
        num_scored: rows of logits behind these, of prompts.
        num_plan_words: int32 words of the attention's plan.
    """

    num_rows: int
    num_requests: int
    num_samples: int
    num_plan_words: int
    num_scored: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Words of each part, in order."""
        rows, requests, samples = self.num_rows, self.num_requests, self.num_samples
        return {
            "token_ids": rows,
            "positions": rows,
            "row_seats": rows,
            "seats": requests,
            "seq_lens": requests,
            "cu_seqlens_q": requests + 1,
            "logits_indices": samples + self.num_scored,
            "sample_seats": 2 * samples,
            **dict.fromkeys(BY_SEAT, samples),
            "seeds": 2 * samples,
            "indices": 2 * samples,
            "counted_seats": samples,
            "plan": self.num_plan_words,
        }

    @cached_property
    def places(self) -> dict[str, slice]:
        """Words of the memory that each part has."""
        places, start = {}, 0
        for name, size in self.sizes.items():
            places[name] = slice(start, start + size)
            start += _aligned(size)
        return places

    @cached_property
    def num_words(self) -> int:
        """All parts."""
        return sum(map(_aligned, self.sizes.values()))

    def num_words_with(self, num_new_blocks: int) -> int:
        """And what a step adds to block tables."""
        return self.num_words + _WORDS_PER_NEW_BLOCK * num_new_blocks

    def new_blocks(self, number: int) -> tuple[slice, slice]:
        """Words of the places, int64, and of the blocks that a step adds to block tables."""
        start, end = self.num_words, self.num_words + 2 * number
        return slice(start, end), slice(end, end + number)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class HostStep:
    """A step on the host, in pinned memory: written part by part."""

    def __init__(self, memory: Words, layout: StepLayout) -> None:
        """`memory`: int32, as much as the layout and the new blocks take."""
        self._memory, self._layout, self._places = memory, layout, layout.places

    def part(self, name: str) -> Words:
        return self._memory[self._places[name]]

    def fill(
        self,
        name: str,
        values: NDArray[np.generic],
        dtype: type[np.generic] = np.int32,
        *,
        padding: int | None = None,
    ) -> None:
        """Write a part, which holds numbers of `dtype`. What is beyond `values` becomes `padding`, or stays."""
        part = self._memory[self._places[name]].view(dtype)
        part[: len(values)] = values
        if padding is not None:
            part[len(values) :] = padding

    def fill_by_seat(self, values: Words) -> None:
        """Write the parts BY_SEAT from their rows, int32 [len(BY_SEAT), number]."""
        start, stride = self._places[BY_SEAT[0]].start, _aligned(self._layout.num_samples)
        parts = self._memory[start : start + len(BY_SEAT) * stride].reshape(len(BY_SEAT), stride)
        parts[:, : values.shape[1]] = values

    def fill_new_blocks(self, places: list[int], blocks: list[int]) -> None:
        of_places, of_blocks = self._layout.new_blocks(len(blocks))
        self._memory[of_places].view(np.int64)[:] = places
        self._memory[of_blocks] = blocks


class DeviceSamples(NamedTuple):
    """The rows that a step samples, on the device.

    Attributes:
        seats: int64 [num_rows], whose each is.
    """

    seats: Tensor
    rows: SamplingRows


class DeviceStep:
    """The same step on the device; for a recorded graph, all its steps, of which each has other values in the same places."""

    def __init__(self, memory: Tensor, layout: StepLayout) -> None:
        self._memory, self.layout = memory, layout
        self._samples: dict[int, DeviceSamples] = {}

    def part(self, name: str, dtype: torch.dtype = torch.int32) -> Tensor:
        return self._memory[self.layout.places[name]].view(dtype)

    def new_blocks(self, number: int) -> tuple[Tensor, Tensor]:
        """int64 and int32 [number]: places in the block tables, and blocks."""
        places, blocks = self.layout.new_blocks(number)
        return self._memory[places].view(torch.int64), self._memory[blocks]

    def samples(self, number: int) -> DeviceSamples:
        """The first ones, without padding; made once."""
        if number not in self._samples:
            self._samples[number] = self._first_samples(number)
        return self._samples[number]

    def _first_samples(self, number: int) -> DeviceSamples:
        rows = SamplingRows(
            temperature=self.part("temperature", torch.float32)[:number],
            top_p=self.part("top_p", torch.float32)[:number],
            min_p=self.part("min_p", torch.float32)[:number],
            top_k=self.part("top_k")[:number],
            seeds=self.part("seeds", torch.int64)[:number],
            indices=self.part("indices", torch.int64)[:number],
            seats=self.part("counted_seats")[:number],
        )
        return DeviceSamples(self.part("sample_seats", torch.int64)[:number], rows)
