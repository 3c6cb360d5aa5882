"""PagedAttention: one layer's attention over the paged cache, and its launchers: write_kv, attention, merge."""

import math

import torch
from torch import Tensor

from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.plan import Planner
from evenhand_kernels.cuda.work import AttentionWork, CudaPlan
from evenhand_kernels.device import Device
from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, AttentionPlan, KvCacheShape

LOG2_E = 1 / math.log(2)
NO_WINDOW = 1 << 30
MERGE_ROW_BLOCKS = 8


class PagedAttention:
    """Implements `Attention` for one layer.

    Attributes:
        keys, values: uint8 [num_blocks, num_kv_heads, block_size, bytes of a row], the paged cache. Within eight tokens rows lie
            in atoms, not one after the other: kv_layout.cuh draws it.
    """

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype,
        layer: AttentionLayer,
        cache: KvCacheShape,
        work: AttentionWork,
        *,
        choice: variants.AttentionChoice = variants.PORTABLE,
    ) -> None:
        """`cache.dtype` is the activations' `dtype` or float8_e4m3fn. Adds itself to `work`. Raises ValueError."""
        heads = layer.num_kv_heads
        if layer.head_dim % 16 or layer.head_dim > 256 or cache.block_size % 16:
            raise ValueError(
                f"head_dim {layer.head_dim} must be a multiple of 16 up to 256, "
                f"block_size {cache.block_size} a multiple of 16"
            )
        key = (dtype, cache.dtype, layer.head_dim, cache.block_size)
        variant = variants.attention(*key, device.architecture, soft_cap=layer.soft_cap is not None, choice=choice)
        self._group = layer.num_heads // heads
        planner = Planner(
            num_kv_heads=heads,
            group=self._group,
            prompt_rows=variants.prompt_rows(layer.head_dim),
            num_slots=device.num_multiprocessors * variant.blocks_per_sm,
        )
        self._work, self._layer = work, layer
        work.add_layer(planner, layer.head_dim, layer.sliding_window)
        self._write_kv = device.load(variants.write_kv(*key))
        self._attention = device.load(variant)
        self._merge = device.load(variants.merge(*key))
        bytes_of_row = layer.head_dim * cache.dtype.itemsize
        shape = (2, cache.num_blocks, heads, cache.block_size, bytes_of_row)
        self.keys, self.values = torch.zeros(shape, dtype=torch.uint8, device=device.torch_device)
        ones = torch.ones(heads, device=device.torch_device)
        self._key_scales = ones if layer.key_scales is None else layer.key_scales
        self._value_scales = ones if layer.value_scales is None else layer.value_scales
        self._cache = {
            "keys": self.keys,
            "values": self.values,
            "key_scales": self._key_scales,
            "value_scales": self._value_scales,
        }
        scale = 1 / math.sqrt(layer.head_dim)
        self._scale = scale if layer.soft_cap is not None else scale * LOG2_E
        self._lanes = variants.write_kv_lanes(layer.head_dim)

    def __call__(self, qkv: Tensor, plan: AttentionPlan) -> Tensor:
        assert isinstance(plan, CudaPlan), "the plan was made by other kernels"
        self.write(qkv, plan.batch)
        return self.attend(qkv, plan)

    def write(self, qkv: Tensor, batch: AttentionBatch) -> None:
        """Norm and rotate queries and keys in place; store keys and values."""
        layer, num_heads, num_kv_heads = self._layer, self._layer.num_heads, self._layer.num_kv_heads
        num_vectors = len(qkv) * (num_heads + 2 * num_kv_heads)
        self._write_kv(
            -(-num_vectors * self._lanes // 128),
            qkv=qkv,
            **self._cache,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            cos_sin=layer.cos_sin,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            num_tokens=len(qkv),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            eps=layer.eps,
        )

    def attend(self, qkv: Tensor, plan: CudaPlan) -> Tensor:
        """Of queries that have been normed and rotated, with keys and values that lie in the cache."""
        layer, batch, window = self._layer, plan.batch, self._layer.sliding_window
        work = self._work.of_window(plan, window)
        partial_output, partial_state = self._work.partials
        output = qkv.new_empty(len(qkv), layer.num_heads * layer.head_dim)
        shared: dict[
            str, Tensor | int
        ] = {  # by both kernels: the second puts together what the first has left in parts
            "counts": work.counts,
            "cu_seqlens_q": batch.cu_seqlens_q,
            "output": output,
            "partial_output": partial_output,
            "partial_state": partial_state,
            "num_kv_heads": layer.num_kv_heads,
            "group": self._group,
        }
        self._attention(
            (layer.num_kv_heads, work.num_items),
            query=qkv,
            **self._cache,
            **shared,
            block_table=batch.block_table,
            seq_lens=batch.seq_lens,
            items=work.items,
            query_stride=qkv.stride(0),
            table_stride=batch.block_table.stride(0),
            window=NO_WINDOW if window is None else window,
            scale=self._scale,
            soft_cap=layer.soft_cap or 0.0,
        )
        self._merge(
            (layer.num_kv_heads, MERGE_ROW_BLOCKS, work.num_merges),
            **shared,
            merges=work.merges,
            value_scales=self._value_scales,
        )
        return output
