"""Each kernel against its ceiling, in the shape of an 8B model: what memory bounds against the device's own copy rate, measured
in the same run; attention of prompts against torch's flash attention.

A figure of `decode` and of `memory` is the kernel's bytes a second over the copy's (bytes read and written). Those of
`prefill` are TFLOP/s of the causal half, by what multiplies too where a device has both, and how often as fast as torch the
kernel is. Keys and values of a decode case are larger than the L2 cache; what the small kernels move is, too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpu_common import Options, copy_rate, options, report, seconds_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.cuda.sampling import DeviceSampler, SamplingRows
from evenhand_kernels.cuda.variants import AttentionChoice, has_wgmma
from evenhand_kernels.device import Device
from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, KvCacheShape

BLOCK_SIZE = 16
Requests = list[tuple[int, int]]  # tokens of this step, tokens in all


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA_8B = Heads(32, 8, 128)
TINY = Heads(4, 1, 64)


class Attending:
    """One layer's attention over requests whose keys and values are random; `choice` None: what is the fastest here."""

    def __init__(self, device: Device, heads: Heads, requests: Requests, choice: AttentionChoice | None = None) -> None:
        self.device, self.heads, self.requests = device, heads, requests
        kernels = CudaKernels(device, torch.bfloat16, choice=choice)
        layer = AttentionLayer(heads.num_heads, heads.num_kv_heads, heads.head_dim, 1e-5)
        counts = [-(-total // BLOCK_SIZE) for _, total in requests]
        self._attend = kernels.attention(layer, KvCacheShape(sum(counts), BLOCK_SIZE, torch.bfloat16))
        generator = torch.Generator(device.torch_device).manual_seed(0)
        for memory in (self._attend.keys, self._attend.values):
            memory.view(torch.bfloat16).normal_(generator=generator)
        batch = self._batch(counts)
        self._plan = kernels.plan(batch)
        columns = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        self.qkv = torch.randn(
            len(batch.positions), columns, dtype=torch.bfloat16, device=device.torch_device, generator=generator
        )

    def attend(self) -> Tensor:
        """The attention alone: keys and values lie in the cache."""
        return self._attend.attend(self.qkv, self._plan)

    def write(self) -> None:
        self._attend.write(self.qkv, self._plan.batch)

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values that the requests read."""
        return sum(total for _, total in self.requests) * self.heads.num_kv_heads * self.heads.head_dim * 2 * 2

    def _batch(self, counts: list[int]) -> AttentionBatch:
        def tensor(values: list[int] | Tensor) -> Tensor:
            return torch.as_tensor(values, dtype=torch.int32, device=self.device.torch_device)

        table = torch.full((len(counts), max(counts)), -1)
        order, first = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)), 0
        for row, count in enumerate(counts):
            table[row, :count] = order[first : first + count]
            first += count
        positions = torch.cat([torch.arange(total - new, total) for new, total in self.requests])
        request = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor([new for new, _ in self.requests]))
        slots = table[request, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        ends = [0]
        for new, _ in self.requests:
            ends.append(ends[-1] + new)
        return AttentionBatch(
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            block_table=tensor(table),
            seq_lens=tensor([total for _, total in self.requests]),
            cu_seqlens_q=tensor(ends),
        )


def decodes(options: Options, device: Device, rate: float) -> None:
    cases: dict[str, Requests] = {
        "32 x 4096": [(1, 4096)] * 32,
        "256 x 1024": [(1, 1024)] * 256,
        "28000 beside 31 short": [(1, 28_000), *[(1, 100)] * 31],
    }
    heads = LLAMA_8B
    if options.is_tiny:
        cases, heads = {"2 x 20": [(1, 20)] * 2}, TINY
    found = {}
    for name, requests in cases.items():
        attending = Attending(device, heads, requests)
        seconds = seconds_of(device, attending.attend, 2 if options.is_tiny else 20)
        found[name] = {"us": 1e6 * seconds, "of_copy_rate": attending.kv_bytes / seconds / rate}
        report(decode=found)


def prefill(options: Options, device: Device) -> None:
    heads, num_tokens, number = (TINY, 40, 1) if options.is_tiny else (LLAMA_8B, 8192, 4)
    attending = Attending(device, heads, [(num_tokens, num_tokens)])
    seconds = seconds_of(device, attending.attend, number)
    group = heads.num_heads // heads.num_kv_heads
    sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
    by_head = attending.qkv.view(1, num_tokens, -1, heads.head_dim).transpose(1, 2)
    query, key, value = (part.contiguous() for part in torch.split(by_head, sizes, dim=1))
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)

    def flash() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash_seconds = seconds_of(device, flash, number)
        attending.write()
        expected = flash().transpose(1, 2).reshape(num_tokens, -1)
    error = (attending.attend().float() - expected.float()).abs().max().item()
    flop = 4 * heads.num_heads * heads.head_dim * num_tokens * (num_tokens + 1) / 2
    by_variant = {}
    if has_wgmma(device.architecture, torch.bfloat16, torch.bfloat16, heads.head_dim):
        for wgmma in (False, True):
            one = Attending(device, heads, [(num_tokens, num_tokens)], AttentionChoice(wgmma=wgmma))
            by_variant["wgmma" if wgmma else "mma.sync"] = flop / seconds_of(device, one.attend, number) / 1e12
    report(
        prefill={
            "tokens": num_tokens,
            "tflops": flop / seconds / 1e12,
            "tflops_by_variant": by_variant,
            "flash_tflops": flop / flash_seconds / 1e12,
            "of_flash": flash_seconds / seconds,
            "max_difference": error,
        }
    )


def moving(options: Options, device: Device, rate: float) -> None:
    """What only moves numbers: rows of an 8B model's width, large enough to miss the L2 cache."""
    rows, size, inner, vocab_size = (3, 64, 96, 199) if options.is_tiny else (8192, 4096, 14_336, 128_256)
    kernels = CudaKernels(device, torch.bfloat16)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device.torch_device)

    x, residual, weight = tensor(rows, size), tensor(rows, size), torch.ones(size, device=device.torch_device)
    both, product = tensor(rows, 2 * inner), torch.empty(rows, inner, dtype=torch.bfloat16, device=device.torch_device)
    table = tensor(vocab_size, size)
    ids = torch.randint(vocab_size, (rows,), dtype=torch.int32, device=device.torch_device)
    embedding = kernels.embedding(table)
    silu_mul, blocks = device.load(variants.silu_mul(torch.bfloat16)), -(-rows * inner // (8 * 256))
    attending = Attending(device, TINY if options.is_tiny else LLAMA_8B, [(rows, rows)])
    logits = tensor(2 if options.is_tiny else 256, vocab_size)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "add_rms_norm": (4 * x.nbytes, lambda: kernels.add_rms_norm(x, residual, weight, 1e-5)),
        "silu_mul": (
            3 * product.nbytes,
            lambda: silu_mul(blocks, gate_up=both, output=product, num_rows=rows, size=inner),
        ),
        "embedding": (2 * x.nbytes, lambda: embedding(ids)),
        "write_kv": (2 * attending.qkv.nbytes, attending.write),
        "sample, temperature": (logits.nbytes, _sampling(device, logits, top_p=1.0)),
        "sample, top-p": (logits.nbytes, _sampling(device, logits, top_p=0.9)),
    }
    found = {}
    for name, (size_in_bytes, work) in works.items():
        seconds = seconds_of(device, work, 2 if options.is_tiny else 50)
        found[name] = {"us": 1e6 * seconds, "of_copy_rate": size_in_bytes / seconds / rate}
        report(memory=found)


def _sampling(device: Device, logits: Tensor, top_p: float) -> Callable[[], Tensor]:
    number, where = len(logits), device.torch_device
    rows = SamplingRows(
        temperature=torch.ones(number, device=where),
        top_p=torch.full((number,), top_p, device=where),
        min_p=torch.zeros(number, device=where),
        top_k=torch.zeros(number, dtype=torch.int32, device=where),
        seeds=torch.arange(number, device=where),
        indices=torch.zeros(number, dtype=torch.int64, device=where),
        seats=torch.full((number,), -1, dtype=torch.int32, device=where),
    )
    sampler = DeviceSampler(device, logits.dtype, logits.shape[1])
    return lambda: sampler.sample(logits, rows)


def main() -> None:
    chosen = options(__doc__).options
    device = chosen.make_device()
    with device.stream(), torch.inference_mode():
        rate = copy_rate(device, 1 << 16 if chosen.is_tiny else 4 << 30)
        report(architecture=device.architecture, copy_rate_tb_per_s=rate / 1e12)
        decodes(chosen, device, rate)
        prefill(chosen, device)
        moving(chosen, device, rate)


if __name__ == "__main__":
    main()
