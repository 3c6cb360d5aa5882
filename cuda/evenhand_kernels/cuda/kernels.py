"""CudaKernels: the kernels in CUDA C++, and torch for products of matrices; on a GPU or on the emulated device.

Activations, weights and the residual are bfloat16 or float16; norms, softmax and rotations are computed in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.plan import HEADER_WORDS, WORDS, Capacity, Planner
from evenhand_kernels.device import Device
from evenhand_kernels.drawing import draw_rows
from evenhand_kernels.kernels import (
    AttentionBatch,
    AttentionLayer,
    AttentionPlan,
    Draw,
    Embedding,
    KvCacheShape,
    Linear,
)
from evenhand_kernels.quantized import QuantizedTensor, Weight

LOG2_E = 1 / math.log(2)
NO_WINDOW = 1 << 30
MERGE_ROW_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class WorkShape:
    """How large the launches of a step are, and where its work lies; hashable, the key of a recorded graph.

    Attributes:
        capacity: of the words of each window.
        num_items, num_merges: blocks to launch for each window, which may be more than there is work for.
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


class CudaKernels:
    """Implements `Kernels`.

    A step's plan is made on the host (`write_work`), goes to the device with the step's other data, and is then given to
    all layers (`plan_of`). `plan` does all three, for callers that do not care for the time it takes.
    """

    name = "cuda"

    def __init__(self, device: Device, dtype: torch.dtype) -> None:
        """`dtype` of activations and weights: bfloat16 or float16."""
        self.device, self.dtype = device, dtype
        self._windows: list[int] = []
        self._planner: Planner | None = None
        self._partials: tuple[Tensor, Tensor] | None = None
        self._silu_mul = device.load(variants.silu_mul(dtype))
        self._embedding = device.load(variants.embedding(dtype))

    @property
    def torch_device(self) -> torch.device:
        return self.device.torch_device

    # ------------------------------------------------------------------------------------------------- projections

    def linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        dense, bias = self._dense(weight), None if bias is None else self._to_device(bias)
        return lambda x: F.linear(x, dense, bias)

    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        gate_up, size = self.linear(weight, bias), weight.shape[0] // 2

        def gated(x: Tensor) -> Tensor:
            both = gate_up(x)
            y = x.new_empty(len(x), size)
            blocks = -(-len(x) * size // (8 * 256))
            self._silu_mul(blocks, gate_up=both, output=y, num_rows=len(x), size=size)
            return y

        return gated

    def embedding(self, weight: Weight) -> Embedding:
        table = self._dense(weight)
        size = table.shape[1]

        def rows(input_ids: Tensor) -> Tensor:
            x = table.new_empty(len(input_ids), size)
            blocks = -(-len(input_ids) * size // (8 * 256))
            self._embedding(blocks, token_ids=input_ids, table=table, output=x, num_tokens=len(input_ids), size=size)
            return x

        return rows

    def tied_embedding(self, weight: Weight) -> tuple[Embedding, Linear]:
        table = self._dense(weight)
        return self.embedding(table), self.linear(table, None)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(None, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(residual)
        launch = self.device.load(variants.rms_norm(self.dtype, residual.shape[-1]))
        launch(len(residual), x=x, residual=residual, weight=weight, output=y, eps=eps)
        return y

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        return draw_rows(logits.float().cpu(), draws)

    def _dense(self, weight: Weight) -> Tensor:
        return self._to_device(weight.dequantized() if isinstance(weight, QuantizedTensor) else weight)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device.torch_device, self.dtype)

    # --------------------------------------------------------------------------------------------------- attention

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> "PagedAttention":
        """As `Kernels` says; `cache.dtype` is the activations' or float8_e4m3fn. All layers have the same heads."""
        window = layer.sliding_window or NO_WINDOW
        attention = PagedAttention(self, layer, cache, window)
        planner = attention.planner
        if self._planner is None:
            self._planner = planner
            rows = planner.max_partial_rows
            device = self.device.torch_device
            self._partials = torch.empty(rows, layer.head_dim, device=device), torch.empty(rows, 2, device=device)
        if planner != self._planner:
            raise ValueError(f"layers with different heads are not supported: {planner} and {self._planner}")
        if window not in self._windows:
            self._windows.append(window)
        return attention

    def work_shape(self, num_requests: int, num_tokens: int) -> WorkShape:
        """What is enough for any step of so many requests and tokens: for recorded graphs, and to size buffers."""
        capacity = self._plans.capacity(num_requests, num_tokens)
        count = len(self._windows)
        return WorkShape(capacity, (capacity.items,) * count, (capacity.merges,) * count)

    def write_work(
        self,
        words: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        cu_seqlens_q: NDArray[np.int32],
        shape: WorkShape | None = None,
    ) -> WorkShape:
        """Plan a step into `words`, host memory, from its start on.

        Args:
            words: int32, at least `work_shape(len(seq_lens), cu_seqlens_q[-1]).words`.
            seq_lens, cu_seqlens_q: as in AttentionBatch. A padded request has no rows: its cu_seqlens_q does not rise.
            shape: launch as much as this, whatever the work is (a recorded graph's); None: no more than there is.
        """
        bound = shape or self.work_shape(len(seq_lens), int(cu_seqlens_q[-1]))
        size = bound.capacity.words
        works = []
        for index, window in enumerate(self._windows):
            work = self._plans.plan(seq_lens, cu_seqlens_q, None if window == NO_WINDOW else window)
            work.write(words[index * size : (index + 1) * size], bound.capacity)
            works.append(work)
        if shape is not None:
            return shape
        return WorkShape(
            bound.capacity, tuple(len(work.items) for work in works), tuple(len(work.merges) for work in works)
        )

    def plan_of(self, batch: AttentionBatch, words: Tensor, shape: WorkShape) -> CudaPlan:
        """The plan whose words have been copied to the device; nothing is read here."""
        return CudaPlan(batch, words, shape)

    def plan(self, batch: AttentionBatch) -> CudaPlan:
        seq_lens, cu_seqlens_q = batch.seq_lens.cpu().numpy(), batch.cu_seqlens_q.cpu().numpy()
        words = np.zeros(self.work_shape(len(seq_lens), int(cu_seqlens_q[-1])).words, np.int32)
        shape = self.write_work(words, seq_lens, cu_seqlens_q)
        return self.plan_of(batch, torch.from_numpy(words).to(self.device.torch_device), shape)

    def window_words(self, plan: CudaPlan, window: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Counts, items and merges of a window's layers, and how many blocks to launch for each."""
        index, capacity = self._windows.index(window), plan.shape.capacity
        words = plan.words[index * capacity.words : (index + 1) * capacity.words]
        merges = HEADER_WORDS + WORDS * capacity.items
        return (
            words[:2],
            words[HEADER_WORDS:merges],
            words[merges:],
            plan.shape.num_items[index],
            plan.shape.num_merges[index],
        )

    @property
    def partials(self) -> tuple[Tensor, Tensor]:
        """float32 [rows, head_dim] and [rows, 2], where all layers leave parts of split items, one after the other."""
        assert self._partials is not None
        return self._partials

    @property
    def _plans(self) -> Planner:
        assert self._planner is not None, "attention() has made no layer yet"
        return self._planner


class PagedAttention:
    """Implements `Attention` for one layer.

    Attributes:
        keys, values: uint8 [num_blocks, num_kv_heads, block_size, bytes of a row], the paged cache: kv_layout.cuh draws it.
    """

    def __init__(self, kernels: CudaKernels, layer: AttentionLayer, cache: KvCacheShape, window: int) -> None:
        device, heads = kernels.device, layer.num_kv_heads
        if layer.head_dim % 16 or layer.head_dim > 256 or cache.block_size % 16:
            raise ValueError(
                f"head_dim {layer.head_dim} must be a multiple of 16 up to 256, "
                f"block_size {cache.block_size} a multiple of 16"
            )
        key = (kernels.dtype, cache.dtype, layer.head_dim, cache.block_size)
        variant = variants.attention(*key, device.architecture, soft_cap=layer.soft_cap is not None)
        self.planner = Planner(
            num_kv_heads=heads,
            group=layer.num_heads // heads,
            prompt_rows=variants.prompt_rows(layer.head_dim),
            num_slots=device.num_multiprocessors * variant.blocks_per_sm,
        )
        self._kernels, self._layer, self._window = kernels, layer, window
        self._write_kv = device.load(variants.write_kv(*key))
        self._attention = device.load(variant)
        self._merge = device.load(variants.merge(*key))
        bytes_of_row = layer.head_dim * cache.dtype.itemsize
        shape = (2, cache.num_blocks, heads, cache.block_size, bytes_of_row)
        self.keys, self.values = torch.zeros(shape, dtype=torch.uint8, device=device.torch_device)
        ones = torch.ones(heads, device=device.torch_device)
        self._key_scales = ones if layer.key_scales is None else layer.key_scales
        self._value_scales = ones if layer.value_scales is None else layer.value_scales
        scale = 1 / math.sqrt(layer.head_dim)
        self._scale = scale if layer.soft_cap is not None else scale * LOG2_E
        self._lanes = variants.write_kv_lanes(layer.head_dim)

    def __call__(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        assert isinstance(plan, CudaPlan), "the plan was made by other kernels"
        self.write(qkv, plan.batch)
        return self._attend(qkv, plan)

    def write(self, qkv: Tensor, batch: AttentionBatch) -> None:
        """Norm and rotate queries and keys in place; store keys and values."""
        layer, num_heads, num_kv_heads = self._layer, self._layer.num_heads, self._layer.num_kv_heads
        num_vectors = len(qkv) * (num_heads + 2 * num_kv_heads)
        self._write_kv(
            -(-num_vectors * self._lanes // 128),
            qkv=qkv,
            keys=self.keys,
            values=self.values,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            cos_sin=layer.cos_sin,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            key_scales=self._key_scales,
            value_scales=self._value_scales,
            num_tokens=len(qkv),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            eps=layer.eps,
        )

    def _attend(self, qkv: Tensor, plan: CudaPlan) -> Tensor:
        layer, batch, kernels = self._layer, plan.batch, self._kernels
        num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads
        counts, items, merges, num_items, num_merges = kernels.window_words(plan, self._window)
        partial_output, partial_state = kernels.partials
        output = qkv.new_empty(len(qkv), num_heads * layer.head_dim)
        self._attention(
            (num_kv_heads, num_items),
            query=qkv,
            keys=self.keys,
            values=self.values,
            block_table=batch.block_table,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            items=items,
            counts=counts,
            key_scales=self._key_scales,
            value_scales=self._value_scales,
            output=output,
            partial_output=partial_output,
            partial_state=partial_state,
            query_stride=qkv.stride(0),
            table_stride=batch.block_table.stride(0),
            num_kv_heads=num_kv_heads,
            group=self.planner.group,
            window=self._window,
            scale=self._scale,
            soft_cap=layer.soft_cap or 0.0,
        )
        self._merge(
            (num_kv_heads, MERGE_ROW_BLOCKS, num_merges),
            partial_output=partial_output,
            partial_state=partial_state,
            merges=merges,
            counts=counts,
            cu_seqlens_q=batch.cu_seqlens_q,
            value_scales=self._value_scales,
            output=output,
            num_kv_heads=num_kv_heads,
            group=self.planner.group,
        )
        return output
