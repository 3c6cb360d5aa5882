"""Floor: the least time that a step can take on this machine, by what its products and its memory can do."""

import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from evenhand_engine.model.config import ModelConfig
from evenhand_engine.scheduler.batch import ScheduledRequest
from evenhand_kernels.kernels import (
    Kernels,
    Linear,
)


@dataclass(frozen=True)
class Floor:
    """What the machine can do: FLOP and bytes in a second."""

    flops: float
    bandwidth: float
    config: ModelConfig
    weight_bytes: float
    kv_bytes: int

    @classmethod
    def measured(cls, kernels: Kernels, config: ModelConfig, weight_bytes: float, kv_bytes: int) -> Self:
        """The last two: bytes of a weight, and of a number in the KV cache."""
        wide = kernels.linear(torch.randn(2048, 2048), None)
        large = kernels.linear(torch.randn(50_000, 1024), None)
        return cls(
            2 * 512 * 2048**2 / _best(wide, torch.randn(512, 2048)),
            50_000 * 1024 * 4 / _best(large, torch.randn(1, 1024)),
            config,
            weight_bytes,
            kv_bytes,
        )

    def milliseconds(self, items: Sequence[ScheduledRequest]) -> float:
        """Of a step of these items."""
        operations, read = self.work(items)
        return 1e3 * max(operations / self.flops, read / self.bandwidth)

    def work(self, items: Sequence[ScheduledRequest]) -> tuple[float, float]:
        """Operations and bytes that a step of these items needs at least."""
        config = self.config
        head = config.vocab_size * config.hidden_size
        layers = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)
        operations, read = 0, layers * self.weight_bytes
        for item in items:
            num_computed, num_scheduled = item.num_computed_tokens, item.num_scheduled_tokens
            seen = num_scheduled * num_computed + num_scheduled * (num_scheduled + 1) // 2
            operations += 2 * (layers * num_scheduled + head * item.num_samples)
            operations += 4 * config.num_layers * config.num_heads * config.head_dim * seen
            read += 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_computed * self.kv_bytes
        read += head * self.weight_bytes * any(item.num_samples for item in items)
        return operations, read


def _best(operation: Linear, x: Tensor) -> float:
    """Seconds of the fastest of many calls."""
    return min(timeit.repeat(lambda: operation(x), number=1, repeat=30))
