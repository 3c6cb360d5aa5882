"""StepLayout: where each part of a step lies in the one block of memory that goes to the device.

A step takes one copy: the host writes all parts, one after the other, into pinned memory, and one transfer puts them into
device memory at the same offsets. A recorded graph reads them there, so its layout must be the same for all its steps: that
of its padded size.

    rows │ requests │ samples │ attention's plan │ new blocks
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.int32]

_ALIGNMENT = 4  # words: 16 bytes, so that kernels may read vectors


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Sizes of a step's parts. The last part, of pairs (place in the block tables, block), is not part of a graph.

    Attributes:
        num_rows: tokens, padding included.
        num_requests: requests, padding included.
        num_samples: rows of logits that are sampled.
        num_scored: rows of logits behind these, of prompts.
        num_plan_words: int32 words of the attention's plan.
        num_new_blocks: entries of block tables that this step adds.
    """

    num_rows: int
    num_requests: int
    num_samples: int
    num_plan_words: int
    num_new_blocks: int = 0
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
            "sample_seats": samples,
            "temperature": samples,
            "top_p": samples,
            "min_p": samples,
            "top_k": samples,
            "seeds": 2 * samples,
            "indices": 2 * samples,
            "counted_seats": samples,
            "plan": self.num_plan_words,
            "block_places": self.num_new_blocks,
            "blocks": self.num_new_blocks,
        }

    @property
    def places(self) -> dict[str, slice]:
        """Words of the memory that each part has."""
        return _places(self)

    @property
    def num_words(self) -> int:
        """All of it."""
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in self.sizes.values())


@lru_cache(maxsize=256)
def _places(layout: StepLayout) -> dict[str, slice]:
    places, start = {}, 0
    for name, size in layout.sizes.items():
        places[name] = slice(start, start + size)
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places


class HostStep:
    """A step on the host, in pinned memory: written part by part."""

    def __init__(self, memory: Words, layout: StepLayout) -> None:
        """`memory`: int32, at least `layout.num_words`."""
        self._memory, self._places = memory, layout.places

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


class DeviceStep:
    """The same step on the device."""

    def __init__(self, memory: Tensor, layout: StepLayout) -> None:
        self._memory, self._places = memory, layout.places

    def part(self, name: str, dtype: torch.dtype = torch.int32) -> Tensor:
        return self._memory[self._places[name]].view(dtype)
