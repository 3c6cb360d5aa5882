"""ConfigJson: the fields of a checkpoint's `config.json` that matter, as they are written there."""

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]


class ConfigJson(msgspec.Struct, kw_only=True):
    """The fields of `config.json` that matter, with the defaults that all supported architectures share."""

    architectures: list[str]
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Positive
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int | None = None
    sliding_window: Positive | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Positive = 4
    dtype: str | None = None
    torch_dtype: str | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    quantization_config: dict[str, Any] | None = None


def listed(names: Iterable[str]) -> str:
    """For messages."""
    return ", ".join(names)
