"""Which of several kernels that do the same is the fastest on this device: measured, when a model is loaded."""

import torch

from evenhand_kernels.cuda.attention import PagedAttention
from evenhand_kernels.cuda.variants import has_bulk_copies
from evenhand_kernels.cuda.work import AttentionWork
from evenhand_kernels.device import Device
from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, KvCacheShape

NUM_TOKENS = 1024
ROUNDS = 20


def bulk_copies_are_faster(device: Device, dtype: torch.dtype, layer: AttentionLayer, cache: KvCacheShape) -> bool:
    """Decodes of one request for each four multiprocessors: more keys and values than an L2 cache holds, on large devices."""
    if not has_bulk_copies(device.architecture):
        return False
    num_requests = -(-device.num_multiprocessors // 4)
    shape = KvCacheShape(num_requests * -(-NUM_TOKENS // cache.block_size), cache.block_size, cache.dtype)
    seconds = {bulk_copy: _seconds(device, dtype, layer, shape, num_requests, bulk_copy) for bulk_copy in (False, True)}
    return seconds[True] < seconds[False]


def _seconds(
    device: Device, dtype: torch.dtype, layer: AttentionLayer, cache: KvCacheShape, num_requests: int, bulk_copy: bool
) -> float:
    work = AttentionWork(device.torch_device)
    attention = PagedAttention(device, dtype, layer, cache, work, bulk_copy=bulk_copy)

    def tensor(values: torch.Tensor) -> torch.Tensor:
        return values.to(device.torch_device, torch.int32)

    blocks = torch.arange(cache.num_blocks).view(num_requests, -1)
    plan = work.plan(
        AttentionBatch(
            positions=tensor(torch.full((num_requests,), NUM_TOKENS - 1)),
            slot_mapping=tensor(blocks[:, -1] * cache.block_size + (NUM_TOKENS - 1) % cache.block_size),
            block_table=tensor(blocks),
            seq_lens=tensor(torch.full((num_requests,), NUM_TOKENS)),
            cu_seqlens_q=tensor(torch.arange(num_requests + 1)),
            num_decodes=num_requests,
        )
    )
    columns = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    qkv = torch.zeros(num_requests, columns, dtype=dtype, device=device.torch_device)

    def several() -> None:
        for _ in range(ROUNDS):
            attention.attend(qkv, plan)

    return device.seconds(several)
