"""The decoder of all supported architectures, as plain functions over weights, a KV cache and one step's input."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from evenhand_engine.model.config import ModelConfig
from evenhand_engine.model.rope import cos_sin_table
from evenhand_engine.model.weights import LayerWeights, Weights
from evenhand_kernels.kernels import AttentionBatch, AttentionLayer, Kernels, LayerKvCache


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step on the device. Rows are tokens, those of a request next to each other and in order.

    Attributes:
        input_ids: int32 [num_tokens].
        attention: which request each token belongs to, its position and where its key and value go.
        logits_indices: int32 [num_samples], rows whose next token is wanted.
    """

    input_ids: Tensor
    attention: AttentionBatch
    logits_indices: Tensor


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model: what `forward` needs beside the KV cache."""

    kernels: Kernels
    weights: Weights
    attention_layers: tuple[AttentionLayer, ...]
    eps: float


def build_decoder(config: ModelConfig, weights: Weights, kernels: Kernels, max_model_len: int) -> Decoder:
    """Join the weights with what is constant for each layer's attention."""
    cos_sin = cos_sin_table(config.rope, config.head_dim, max_model_len)
    attention_layers = tuple(
        AttentionLayer(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            cos_sin=cos_sin if rotates else None,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            sliding_window=window,
        )
        for layer, window, rotates in zip(weights.layers, config.sliding_windows, config.rope_layers, strict=True)
    )
    return Decoder(kernels, weights, attention_layers, config.rms_norm_eps)


def forward(decoder: Decoder, model_input: ModelInput, kv_cache: Sequence[LayerKvCache]) -> Tensor:
    """Compute one step and store its keys and values. Returns the logits, float32 [num_samples, vocab_size]."""
    kernels, weights = decoder.kernels, decoder.weights
    residual = weights.embedding[model_input.input_ids].float()
    x = kernels.rms_norm(residual, weights.layers[0].input_norm, decoder.eps)
    for index, layer in enumerate(weights.layers):
        if index > 0:
            x = kernels.add_rms_norm(x, residual, layer.input_norm, decoder.eps)
        x = _attention(x, layer, decoder.attention_layers[index], model_input.attention, kv_cache[index], kernels)
        x = kernels.add_rms_norm(x, residual, layer.post_attention_norm, decoder.eps)
        x = layer.down(kernels.silu_mul(layer.gate_up(x)))
    rows = model_input.logits_indices
    last = kernels.add_rms_norm(x[rows], residual[rows], weights.norm, decoder.eps)
    return weights.lm_head(last)


def _attention(
    x: Tensor, layer: LayerWeights, shape: AttentionLayer, batch: AttentionBatch, cache: LayerKvCache, kernels: Kernels
) -> Tensor:
    qkv = layer.qkv(x)
    kernels.store_kv(qkv, shape, batch, cache)
    return layer.output(kernels.attention(qkv, shape, batch, cache))
