"""CudaKernels: the kernels in CUDA C++, and torch for products of dense matrices; on a GPU or on the emulated device.

Activations, weights and the residual are bfloat16 or float16; norms, softmax and rotations are computed in float32.
"""

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evenhand_kernels.cuda import variants
from evenhand_kernels.cuda.attention import PagedAttention
from evenhand_kernels.cuda.choice import fastest_attention
from evenhand_kernels.cuda.quantized import QuantizedLinears
from evenhand_kernels.cuda.work import AttentionWork, CudaPlan
from evenhand_kernels.device import Device, Launch
from evenhand_kernels.drawing import draw_rows
from evenhand_kernels.kernels import (
    AttentionBatch,
    AttentionLayer,
    Draw,
    Embedding,
    KvCacheShape,
    Linear,
    LogProbabilities,
)
from evenhand_kernels.logarithms import log_probabilities
from evenhand_kernels.quantized import QuantizedTensor, Weight

VALUES_PER_BLOCK = 8 * 256
"""Of the kernels that compute each value of their output alone: 8 a thread, 256 threads."""


class CudaKernels:
    """Implements `Kernels`.

    Attributes:
        work: of attention, for callers that plan a step while the device computes the one before.
    """

    name = "cuda"

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype,
        *,
        choice: variants.AttentionChoice | None = None,
        planner: ctypes.CDLL | None = None,
    ) -> None:
        """`dtype` of activations and weights: bfloat16 or float16. `choice` of attention; None: the fastest here. `planner`: as
        AttentionWork takes it."""
        self.device, self.dtype = device, dtype
        self._choice = choice
        self.work = AttentionWork(device.torch_device, planner)
        self._quantized = QuantizedLinears(device, dtype)
        self._silu_mul = device.load(variants.silu_mul(dtype))
        self._embedding = device.load(variants.embedding(dtype))

    @property
    def torch_device(self) -> torch.device:
        return self.device.torch_device

    def linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        if isinstance(weight, QuantizedTensor) and self._quantized.can_take(weight):
            return self._quantized.linear(weight.one_level(), bias)
        dense, bias = self._dense(weight), None if bias is None else self._to_device(bias)
        return lambda x: F.linear(x, dense, bias)

    def gated_linear(self, weight: Weight, bias: Tensor | None) -> Linear:
        gate_up, size = self.linear(weight, bias), weight.shape[0] // 2

        def gated(x: Tensor) -> Tensor:
            return _elementwise(
                self._silu_mul, x.new_empty(len(x), size), gate_up=gate_up(x), num_rows=len(x), size=size
            )

        return gated

    def embedding(self, weight: Weight) -> Embedding:
        table = self._dense(weight)
        size = table.shape[1]

        def rows(input_ids: Tensor) -> Tensor:
            count = len(input_ids)
            return _elementwise(
                self._embedding,
                table.new_empty(count, size),
                token_ids=input_ids,
                table=table,
                num_tokens=count,
                size=size,
            )

        return rows

    def tied_embedding(self, weight: Weight) -> tuple[Embedding, Linear]:
        table = self._dense(weight)
        return self.embedding(table), self.linear(table, None)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(None, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(x, residual, weight, eps)

    def attention(self, layer: AttentionLayer, cache: KvCacheShape) -> PagedAttention:
        """As `Kernels` says; `cache.dtype` is the activations' or float8_e4m3fn. All layers have the same heads."""
        if self._choice is None:
            self._choice = fastest_attention(self.device, self.dtype, layer, cache)
        return PagedAttention(self.device, self.dtype, layer, cache, self.work, choice=self._choice)

    def plan(self, batch: AttentionBatch) -> CudaPlan:
        return self.work.plan(batch)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
        return draw_rows(logits.float().cpu(), draws)

    def log_probabilities(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> LogProbabilities:
        return log_probabilities(logits, token_ids, num_top)

    def _norm(self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(residual)
        launch = self.device.load(variants.rms_norm(self.dtype, residual.shape[-1]))
        launch(len(residual), x=x, residual=residual, weight=weight, output=y, eps=eps)
        return y

    def _dense(self, weight: Weight) -> Tensor:
        return self._to_device(weight.dequantized() if isinstance(weight, QuantizedTensor) else weight)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device.torch_device, self.dtype)


def _elementwise(launch: Launch, output: Tensor, **arguments: Tensor | int) -> Tensor:
    launch(-(-output.numel() // VALUES_PER_BLOCK), output=output, **arguments)
    return output
