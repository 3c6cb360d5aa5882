"""The decoder of all supported architectures, as plain functions over weights, a KV cache and one step's input."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evenhand_engine.model.config import ModelConfig
from evenhand_engine.model.rope import cos_sin_table
from evenhand_engine.model.weights import Weights
from evenhand_kernels.kernels import (
    AttentionLayer,
    AttentionPlan,
    DecoderLayer,
    DecoderOperations,
    Forward,
    FusingKernels,
    Kernels,
    KvCacheShape,
)


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step on the device. Rows are tokens, those of a request next to each other and in order.

    Attributes:
        input_ids: int32 [num_tokens].
        plan: how the step's attention is computed.
        logits_indices: int32 [num_samples], rows whose next token is wanted.
    """

    input_ids: Tensor
    plan: AttentionPlan
    logits_indices: Tensor


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model with its KV cache, which the attention of each layer holds."""

    kernels: Kernels
    compute: Forward


def build_decoder(
    config: ModelConfig, weights: Weights, kernels: Kernels, cache: KvCacheShape, max_model_len: int
) -> Decoder:
    """Add to the weights what is constant for each layer's attention, and allocate the KV cache."""
    cos_sin = cos_sin_table(config.rope, config.head_dim, max_model_len).to(kernels.torch_device)

    def scales(scale: float | None) -> Tensor | None:
        return None if scale is None else torch.full((config.num_kv_heads,), scale, device=kernels.torch_device)

    layers = (
        AttentionLayer(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            cos_sin=cos_sin if rotates else None,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            sliding_window=window,
            key_scales=scales(layer.key_scale),
            value_scales=scales(layer.value_scale),
        )
        for layer, window, rotates in zip(weights.layers, config.sliding_windows, config.rope_layers, strict=True)
    )
    operations = DecoderOperations(
        embedding=weights.embedding,
        layers=tuple(
            DecoderLayer(
                input_norm=layer.input_norm,
                qkv=layer.qkv,
                attention=kernels.attention(attention, cache),
                output=layer.output,
                post_attention_norm=layer.post_attention_norm,
                gate_up=layer.gate_up,
                down=layer.down,
            )
            for layer, attention in zip(weights.layers, layers, strict=True)
        ),
        norm=weights.norm,
        lm_head=weights.lm_head,
        eps=config.rms_norm_eps,
    )
    if isinstance(kernels, FusingKernels):
        return Decoder(kernels, kernels.fused(operations))
    return Decoder(kernels, partial(_compute, kernels, operations))


def forward(decoder: Decoder, model_input: ModelInput) -> Tensor:
    """Compute one step and store its keys and values. Returns the logits, [num_samples, vocab_size]."""
    return decoder.compute(model_input.input_ids, model_input.plan, model_input.logits_indices)


def _compute(
    kernels: Kernels, decoder: DecoderOperations, input_ids: Tensor, plan: AttentionPlan, logits_indices: Tensor
) -> Tensor:
    """A step, operation by operation."""
    residual = decoder.embedding(input_ids)
    x = kernels.rms_norm(residual, decoder.layers[0].input_norm, decoder.eps)
    for index, layer in enumerate(decoder.layers):
        if index > 0:
            x = kernels.add_rms_norm(x, residual, layer.input_norm, decoder.eps)
        x = layer.attention(layer.qkv(x), plan)
        # No row reads another after the last attention: go on with those whose next token is wanted.
        if layer is decoder.layers[-1]:
            x, residual = x[logits_indices], residual[logits_indices]
        x = layer.output(x)
        x = kernels.add_rms_norm(x, residual, layer.post_attention_norm, decoder.eps)
        x = layer.down(layer.gate_up(x))
    return decoder.lm_head(kernels.add_rms_norm(x, residual, decoder.norm, decoder.eps))
