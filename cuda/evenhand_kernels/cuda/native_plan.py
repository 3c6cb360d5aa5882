"""NativePlanner: the planner's work by compiled code, cpu/plan.cpp, straight into the memory that goes to the device."""

import ctypes
from ctypes import c_int32, c_void_p

import numpy as np

from evenhand_kernels.cuda.plan import TILE, Capacity, Counts, Planner
from evenhand_kernels.cuda.units import WORDS, Ints


class PlannerStructure(ctypes.Structure):
    """`Planner` of plan.cpp."""

    _fields_ = tuple((name, c_int32) for name in ("group", "prompt_rows", "slots", "max_parts", "head_rows"))


class NativePlanner:
    """Writes what a Planner would, number by number. Not for two threads at once."""

    def __init__(self, library: ctypes.CDLL, planner: Planner) -> None:
        """`library`: of `cpu.library.load_planner`."""
        self._plan = library.evenhand_plan
        self._plan.restype = None
        self._plan.argtypes = [c_void_p] * 3 + [c_int32] * 3 + [c_void_p] * 2
        fields = (planner.group, planner.prompt_rows, planner.slots, planner.max_parts, planner.head_rows)
        self._structure = PlannerStructure(*fields)
        self._planner = ctypes.addressof(self._structure)
        self._scratch = np.empty(0, np.int32)

    def write(
        self, words: Ints, capacity: Capacity, seq_lens: Ints, cu_seqlens_q: Ints, window: int | None = None
    ) -> Counts:
        """As Planner.write; all arrays are contiguous."""
        num_requests = len(seq_lens)
        scratch = capacity.items * WORDS + int(seq_lens.max(initial=0)) // TILE + 3
        if scratch > len(self._scratch):
            self._scratch = np.empty(2 * scratch, np.int32)
        self._plan(
            self._planner,
            seq_lens.ctypes.data,
            cu_seqlens_q.ctypes.data,
            num_requests,
            window or 0,
            capacity.items,
            words.ctypes.data,
            self._scratch.ctypes.data,
        )
        return Counts(int(words[0]), int(words[1]))
