"""AttentionWork: the work of a step's attention as the kernels read it, planned once for all layers.

Owns what layers share: the planner, the sliding windows that there are, and the buffers for parts of split items. A step's
plan is made on the host (`write`), goes to the device with the step's other data, and is then given to all layers
(`plan_of`). `plan` does all three, for callers that do not care for the time it takes.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.cuda.native_plan import NativePlanner
from evenhand_kernels.cuda.plan import HEADER_WORDS, Capacity, Planner
from evenhand_kernels.cuda.units import WORDS
from evenhand_kernels.kernels import AttentionBatch, AttentionPlan

MERGE_BLOCKS = 16
"""In a recorded graph, for each window, KV head and block of rows: most steps merge little, and blocks with nothing to do take time too."""


@dataclass(frozen=True, slots=True)
class WorkShape:
    """How large the launches of a step are, and where its work lies; hashable, the key of a recorded graph.

    Attributes:
        capacity: of the words of each window.
        num_items, num_merges: blocks to launch for each window, which may be more than there is work for, or fewer than there are merges.
    """

    capacity: Capacity
    num_items: tuple[int, ...]
    num_merges: tuple[int, ...]

    @property
    def words(self) -> int:
        """int32 words of all windows."""
        return self.capacity.words * len(self.num_items)


@dataclass(frozen=True, slots=True)
class CudaPlan(AttentionPlan):
    """How one step's attention is computed, the same for all layers.

    Attributes:
        words: int32 [shape.words] on the device.
    """

    words: Tensor
    shape: WorkShape


class WindowWork(NamedTuple):
    """What the layers of one window launch: int32 words on the device, and how many blocks for each of the two."""

    counts: Tensor
    items: Tensor
    merges: Tensor
    num_items: int
    num_merges: int


class AttentionWork:
    """Plans for the layers of one model, which have all been added before the first plan."""

    def __init__(self, torch_device: torch.device, library: ctypes.CDLL | None = None) -> None:
        """`library`: of `cpu.library.load_planner`; None: plans are made in numpy, which takes ten times as long."""
        self._torch_device, self._library = torch_device, library
        self._windows: list[int | None] = []
        self._planner: Planner | None = None
        self._writer: Planner | NativePlanner | None = None
        self._partials: tuple[Tensor, Tensor] | None = None

    def add_layer(self, planner: Planner, head_dim: int, window: int | None) -> None:
        """A layer's planner must be that of all; `window` is the tokens that a query sees, None: all. Raises ValueError."""
        if self._planner is None:
            self._planner, rows = planner, planner.max_partial_rows
            self._writer = planner if self._library is None else NativePlanner(self._library, planner)
            self._partials = (
                torch.empty(rows, head_dim, device=self._torch_device),
                torch.empty(rows, 2, device=self._torch_device),
            )
        if planner != self._planner:
            raise ValueError(f"layers with different heads are not supported: {planner} and {self._planner}")
        if window not in self._windows:
            self._windows.append(window)

    def shape(self, num_requests: int, num_tokens: int) -> WorkShape:
        """What is enough for any step of so many requests and tokens: for recorded graphs, and to size buffers."""
        capacity = self._plans.capacity(num_requests, num_tokens)
        count = len(self._windows)
        merges = min(capacity.merges, MERGE_BLOCKS)
        return WorkShape(capacity, (capacity.items,) * count, (merges,) * count)

    def write(
        self,
        words: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        cu_seqlens_q: NDArray[np.int32],
        shape: WorkShape | None = None,
    ) -> WorkShape:
        """Plan a step into `words`, host memory, from its start on.

        Args:
            words: int32, at least `shape(len(seq_lens), cu_seqlens_q[-1]).words`.
            seq_lens, cu_seqlens_q: as in AttentionBatch. A padded request has no rows: its cu_seqlens_q does not rise.
            shape: launch as much as this, whatever the work is (a recorded graph's); None: no more than there is.
        """
        bound = shape or self.shape(len(seq_lens), int(cu_seqlens_q[-1]))
        size, capacity = bound.capacity.words, bound.capacity
        assert self._writer is not None
        counts = [
            self._writer.write(words[index * size : (index + 1) * size], capacity, seq_lens, cu_seqlens_q, window)
            for index, window in enumerate(self._windows)
        ]
        if shape is not None:
            return shape
        return WorkShape(capacity, tuple(each.items for each in counts), tuple(each.merges for each in counts))

    def plan_of(self, batch: AttentionBatch, words: Tensor, shape: WorkShape) -> CudaPlan:
        """The plan whose words have been copied to the device; nothing is read here."""
        return CudaPlan(batch, words, shape)

    def plan(self, batch: AttentionBatch) -> CudaPlan:
        """As `Kernels.plan`: waits for the device, which has the lengths."""
        seq_lens, cu_seqlens_q = batch.seq_lens.cpu().numpy(), batch.cu_seqlens_q.cpu().numpy()
        words = np.zeros(self.shape(len(seq_lens), int(cu_seqlens_q[-1])).words, np.int32)
        shape = self.write(words, seq_lens, cu_seqlens_q)
        return self.plan_of(batch, torch.from_numpy(words).to(self._torch_device), shape)

    def of_window(self, plan: CudaPlan, window: int | None) -> WindowWork:
        """The part of a plan that the layers of one window compute."""
        index, capacity = self._windows.index(window), plan.shape.capacity
        words = plan.words[index * capacity.words : (index + 1) * capacity.words]
        merges = HEADER_WORDS + WORDS * capacity.items
        return WindowWork(
            counts=words[:2],
            items=words[HEADER_WORDS:merges],
            merges=words[merges:],
            num_items=plan.shape.num_items[index],
            num_merges=plan.shape.num_merges[index],
        )

    @property
    def partials(self) -> tuple[Tensor, Tensor]:
        """float32 [rows, head_dim] and [rows, 2], where all layers leave parts of split items, one after the other."""
        assert self._partials is not None
        return self._partials

    @property
    def _plans(self) -> Planner:
        assert self._planner is not None, "no layer has been added yet"
        return self._planner
