"""The decoder of all supported architectures, as plain functions over weights, a KV cache and one step's input."""

from dataclasses import dataclass

from torch import Tensor

from evenhand_engine.model.config import ModelConfig
from evenhand_engine.model.rope import cos_sin_table
from evenhand_engine.model.weights import Weights
from evenhand_kernels.kernels import Attention, AttentionBatch, AttentionLayer, Kernels, KvCacheShape


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
    """A loaded model with its KV cache, which the attention of each layer holds."""

    kernels: Kernels
    weights: Weights
    attention: tuple[Attention, ...]
    eps: float


def build_decoder(
    config: ModelConfig, weights: Weights, kernels: Kernels, cache: KvCacheShape, max_model_len: int
) -> Decoder:
    """Add to the weights what is constant for each layer's attention, and allocate the KV cache."""
    cos_sin = cos_sin_table(config.rope, config.head_dim, max_model_len)
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
        )
        for layer, window, rotates in zip(weights.layers, config.sliding_windows, config.rope_layers, strict=True)
    )
    attention = tuple(kernels.attention(layer, cache) for layer in layers)
    return Decoder(kernels, weights, attention, config.rms_norm_eps)


def forward(decoder: Decoder, model_input: ModelInput) -> Tensor:
    """Compute one step and store its keys and values. Returns the logits, float32 [num_samples, vocab_size]."""
    kernels, weights, eps = decoder.kernels, decoder.weights, decoder.eps
    plan = kernels.plan(model_input.attention)
    residual = kernels.embed(weights.embedding, model_input.input_ids)
    x = kernels.rms_norm(residual, weights.layers[0].input_norm, eps)
    for index, (layer, attention) in enumerate(zip(weights.layers, decoder.attention, strict=True)):
        if index > 0:
            x = kernels.add_rms_norm(x, residual, layer.input_norm, eps)
        x = attention(layer.qkv(x), plan)
        if layer is weights.layers[-1]:
            # No row reads another from here on: go on with those whose next token is wanted.
            x, residual = x[model_input.logits_indices], residual[model_input.logits_indices]
        x = layer.output(x)
        x = kernels.add_rms_norm(x, residual, layer.post_attention_norm, eps)
        x = layer.down(layer.gate_up(x))
    return weights.lm_head(kernels.add_rms_norm(x, residual, weights.norm, eps))
