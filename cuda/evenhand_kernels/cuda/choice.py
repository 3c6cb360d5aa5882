"""Which of several kernels that do the same is the fastest on this device: measured, when a model is loaded."""

import torch

from evenhand_kernels.cuda.attention import PagedAttention
from evenhand_kernels.cuda.variants import PORTABLE, AttentionChoice, has_bulk_copies, has_wgmma
from evenhand_kernels.cuda.work import AttentionWork
from evenhand_kernels.device import Device
from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, KvCacheShape

DECODE_TOKENS = 1024
"""Of each of the decodes, one for each four multiprocessors: more keys and values than an L2 cache holds, on large devices."""

PROMPT_TOKENS = 32
"""Of the prompt, for each multiprocessor: 4,224 on an H100, several waves of blocks."""

ROUNDS = 20


def fastest_attention(
    device: Device, dtype: torch.dtype, layer: AttentionLayer, cache: KvCacheShape
) -> AttentionChoice:
    """What decodes and what prompts are best made of, of what this device can run; the other part does not matter to either."""
    choice = PORTABLE
    if has_bulk_copies(device.architecture):
        count = -(-device.num_multiprocessors // 4)
        decodes = [(1, DECODE_TOKENS)] * count
        choices = (choice, choice._replace(bulk_copy=True))
        choice = min(choices, key=lambda one: _seconds(device, dtype, layer, cache, decodes, one))
    if has_wgmma(device.architecture, dtype, cache.dtype, layer.head_dim):
        num_tokens = PROMPT_TOKENS * device.num_multiprocessors
        choices = (choice, choice._replace(wgmma=True))
        choice = min(choices, key=lambda one: _seconds(device, dtype, layer, cache, [(num_tokens, num_tokens)], one))
    return choice


def _seconds(
    device: Device,
    dtype: torch.dtype,
    layer: AttentionLayer,
    cache: KvCacheShape,
    requests: list[tuple[int, int]],
    choice: AttentionChoice,
) -> float:
    """Of `requests`, as (tokens of this step, tokens in all), the same for each; random ones, since how often maxima rise, and what
    power a device takes, depend on the numbers.
    """
    (num_new, num_tokens), count = requests[0], len(requests)
    blocks_of_each = -(-num_tokens // cache.block_size)
    work = AttentionWork(device.torch_device)
    shape = KvCacheShape(count * blocks_of_each, cache.block_size, cache.dtype)
    attention = PagedAttention(device, dtype, layer, shape, work, choice=choice)
    generator = torch.Generator(device.torch_device).manual_seed(0)

    def random(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device.torch_device).to(dtype)

    for memory in (attention.keys, attention.values):
        memory.view(-1).copy_(random(memory.numel() // cache.dtype.itemsize, cache.dtype).view(torch.uint8))

    def tensor(values: torch.Tensor) -> torch.Tensor:
        return values.to(device.torch_device, torch.int32)

    table = torch.arange(count * blocks_of_each).view(count, -1)
    positions = torch.arange(num_tokens - num_new, num_tokens)
    slots = table[:, positions // cache.block_size] * cache.block_size + positions % cache.block_size
    plan = work.plan(
        AttentionBatch(
            positions=tensor(positions.repeat(count)),
            slot_mapping=tensor(slots.flatten()),
            block_table=tensor(table),
            seq_lens=tensor(torch.full((count,), num_tokens)),
            cu_seqlens_q=tensor(torch.arange(count + 1) * num_new),
        )
    )
    columns = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    qkv = random(count * num_new * columns, dtype).view(-1, columns)
    return device.seconds(lambda: attention.attend(qkv, plan), ROUNDS)
