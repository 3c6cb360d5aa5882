"""Shard: the part of a model that one of several devices computes (tensor parallelism, arXiv 1909.08053).

Heads and inner features are dealt out: queries, keys, values, gate and up have the outputs of their own, and the
projections behind them, output and down, the inputs: each device's product is a part of the sum, and all parts are added up
before the residual. Embedding, norms and the head are on every device, so that each has all logits and samples the same tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config import ModelConfig
from evenhand_kernels.kernels import Linear
from evenhand_kernels.quantized import SUPER_BLOCK, QuantizedTensor, Weight


class TensorSource(Protocol):
    """Where tensors come from: a checkpoint, or a random number generator."""

    def take(self, name: str, *shape: int) -> Weight:
        """The tensor of that name and shape, for the only time. Only matrices may be quantised."""
        ...

    def take_scale(self, name: str) -> float | None:
        """The only number of a tensor that need not be there; None: it is not."""
        ...


Made = TypeVar("Made")


class Share(Protocol):
    def __call__(self, make: Callable[[], Made]) -> Made:
        """What `make` returns on the first part, on each of them; no other calls it. All parts share as often."""
        ...


BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` of `size`.

    Attributes:
        add_up: the sum of this tensor over all parts, on each of them; may be the tensor itself.
        least: the least of such numbers of all parts.
        share: what the first part makes, on all of them; None: there is no other.
    """

    rank: int = 0
    size: int = 1
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor
    least: Callable[[int], int] = lambda number: number
    share: Share | None = None


WHOLE = Shard()


def sharded_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The shape of the part. Raises StartupError where it cannot be dealt out evenly."""
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(config, name) % shard.size:
            raise StartupError(
                f"tensor parallel size {shard.size} does not divide the model's {name} {getattr(config, name)}: choose one "
                "that does"
            )
    return replace(
        config,
        num_heads=config.num_heads // shard.size,
        num_kv_heads=config.num_kv_heads // shard.size,
        intermediate_size=config.intermediate_size // shard.size,
    )


def row_parallel(
    make: Callable[[Weight, Tensor | None], Linear], shard: Shard
) -> Callable[[Weight, Tensor | None], Linear]:
    """Makes products whose inputs are dealt out."""
    if shard.size == 1:
        return make

    def make_and_add_up(weight: Weight, bias: Tensor | None) -> Linear:
        linear = make(weight, bias)
        return lambda x: shard.add_up(linear(x))

    return make_and_add_up


class ShardedSource:
    """Implements `TensorSource`: the part's rows or columns of another source's tensors."""

    def __init__(self, source: TensorSource, shard: Shard) -> None:
        self._source, self._shard = source, shard

    def take(self, name: str, *shape: int) -> Weight:
        """`shape` of the part. A bias behind inputs that are dealt out is added once, by the first part."""
        module = name.split(".")[-2] if "." in name else ""
        if module in BY_OUTPUTS:
            whole = self._source.take(name, shape[0] * self._shard.size, *shape[1:])
            return self._rows(whole, shape[0])
        if module in BY_INPUTS and len(shape) == 2:
            whole = self._source.take(name, shape[0], shape[1] * self._shard.size)
            return self._columns(whole, shape[1], name)
        taken = self._source.take(name, *shape)
        if module in BY_INPUTS and self._shard.rank > 0 and isinstance(taken, Tensor):
            return torch.zeros_like(taken)
        return taken

    def take_scale(self, name: str) -> float | None:
        return self._source.take_scale(name)

    def _rows(self, whole: Weight, size: int) -> Weight:
        rows = slice(self._shard.rank * size, (self._shard.rank + 1) * size)
        if isinstance(whole, Tensor):
            return whole[rows].clone()
        return QuantizedTensor(**{name: part.clone() for name, part in whole.rows(rows).parts().items()})

    def _columns(self, whole: Weight, size: int, name: str) -> Weight:
        begin = self._shard.rank * size
        if isinstance(whole, Tensor):
            return whole[:, begin : begin + size].clone()
        if size % whole.group and whole.group % size:
            raise StartupError(
                f"tensor {name}: groups of {whole.group} inputs cannot be dealt out to {self._shard.size} devices: choose a "
                "smaller tensor parallel size"
            )
        if size % SUPER_BLOCK:
            whole = whole.one_level()
        codes = slice(begin * whole.bits // 8, (begin + size) * whole.bits // 8)
        groups = slice(begin // whole.group, -(-(begin + size) // whole.group))
        supers = slice(begin // SUPER_BLOCK, (begin + size) // SUPER_BLOCK)
        columns = {"codes": codes, "factors": supers}
        return QuantizedTensor(
            **{name: part[:, columns.get(name, groups)].clone() for name, part in whole.parts().items()}
        )
