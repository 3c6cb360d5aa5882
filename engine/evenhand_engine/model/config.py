"""ModelConfig: the shape of a decoder, read from a checkpoint's `config.json` and resolved to the last default."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config_json import ConfigJson, listed
from evenhand_engine.model.packed_format import QuantizedFormat, parse_quantized_format
from evenhand_engine.model.rope_config import RopeConfig, context_length, parse_rope

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder.

    Attributes:
        max_position_embeddings: longest context, rope scaling included.
        attention_bias: biases on q, k and v.
        attention_output_bias: bias on the attention's output projection.
        qk_norm: RMSNorm of each query and key head before RoPE.
        sliding_windows: for each layer, how many tokens a query sees, itself included; None: all.
        rope_layers: for each layer, whether it rotates queries and keys at all.
        dtype: in which the checkpoint is stored, "float32" if it does not say.
        quantized_format: of projections that it holds quantised; None: it has none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    rope_layers: tuple[bool, ...]
    dtype: str
    quantized_format: QuantizedFormat | None

    @property
    def num_parameters(self) -> int:
        """Of the weights; biases and norms are too few to count."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp) + embeddings


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `config.json`. Raises StartupError naming the missing, malformed or unsupported field."""
    path = model_dir / "config.json"
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StartupError(f"model {model_dir}: no config.json; is it a Hugging Face model directory?") from error
    except (OSError, ValueError) as error:
        raise StartupError(f"{path}: cannot be read: {error}") from error
    return parse_model_config(document, str(path))


def parse_model_config(document: Any, origin: str) -> ModelConfig:
    """Resolve a `config.json` document; `origin` names it in errors. Raises StartupError."""
    _require_architecture(document, origin)
    try:
        fields = msgspec.convert(_without_nulls(document), ConfigJson, strict=False)
    except msgspec.ValidationError as error:
        raise StartupError(f"{origin}: {error}") from error
    architecture = fields.architectures[0]
    qwen2, qwen3, smollm3 = (architecture.startswith(name) for name in ("Qwen2", "Qwen3", "SmolLM3"))
    num_kv_heads = fields.num_key_value_heads or fields.num_attention_heads
    if architecture.startswith("Mistral") and "num_key_value_heads" not in document:
        num_kv_heads = 8
    rope = parse_rope(fields, 2e6 if smollm3 else 1e4, origin)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.vocab_size,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        num_layers=fields.num_hidden_layers,
        num_heads=fields.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.head_dim or (128 if qwen3 else fields.hidden_size // fields.num_attention_heads),
        rms_norm_eps=fields.rms_norm_eps,
        max_position_embeddings=context_length(fields, rope),
        tie_word_embeddings=smollm3 if fields.tie_word_embeddings is None else fields.tie_word_embeddings,
        attention_bias=qwen2 or fields.attention_bias,
        attention_output_bias=fields.attention_bias and not qwen2,
        mlp_bias=fields.mlp_bias,
        qk_norm=qwen3,
        rope=rope,
        sliding_windows=_sliding_windows(fields),
        rope_layers=_rope_layers(fields),
        dtype=(fields.dtype or fields.torch_dtype or "float32").removeprefix("torch."),
        quantized_format=(
            None if fields.quantization_config is None else parse_quantized_format(fields.quantization_config, origin)
        ),
    )
    _check(fields, config, origin)
    return config


def _without_nulls(document: dict[str, Any]) -> dict[str, Any]:
    """As transformers reads it: null is false, or none given. Only a sliding window means another thing by it."""
    return {name: value for name, value in document.items() if value is not None or name == "sliding_window"}


def _require_architecture(document: Any, origin: str) -> None:
    architectures = document.get("architectures") if isinstance(document, dict) else None
    if not isinstance(architectures, list) or not architectures:
        raise StartupError(
            f"{origin}: `architectures` is missing; it should name one of {listed(SUPPORTED_ARCHITECTURES)}"
        )
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise StartupError(
            f"{origin}: architecture {architectures[0]} is not supported; "
            f"supported are {listed(SUPPORTED_ARCHITECTURES)}"
        )


def _check(fields: ConfigJson, config: ModelConfig, origin: str) -> None:
    """Refuse what the decoder would compute wrongly."""
    if fields.hidden_act != "silu":
        raise StartupError(f"{origin}: hidden_act {fields.hidden_act} is not supported; supported is silu")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(fields, name)) is not None:
            raise StartupError(f"{origin}: {name} {cap} is not supported; no supported architecture has it")
    if config.num_heads % config.num_kv_heads:
        raise StartupError(
            f"{origin}: num_attention_heads {config.num_heads} is no multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.head_dim % 8 or config.head_dim > 256:
        raise StartupError(
            f"{origin}: head_dim {config.head_dim} is not supported; it must be a multiple of 8 up to 256"
        )
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise StartupError(f"{origin}: dtype {config.dtype} is not supported; supported are float32, bfloat16, float16")
    rope = config.rope
    if rope.theta <= 1 or min(rope.factor, rope.original_max_position_embeddings, rope.beta_slow) <= 0:
        raise StartupError(
            f"{origin}: rope_theta must be above 1, rope's factor, original_max_position_embeddings and beta_slow above 0"
        )
    if rope.beta_fast < rope.beta_slow or rope.high_freq_factor <= rope.low_freq_factor or rope.low_freq_factor <= 0:
        raise StartupError(
            f"{origin}: rope's beta_fast must not be below beta_slow, and high_freq_factor must be above "
            "low_freq_factor, which must be above 0"
        )
    if config.rope.rope_type == "longrope":
        counts = {len(config.rope.short_factor), len(config.rope.long_factor)}
        if counts != {config.head_dim // 2}:
            raise StartupError(
                f"{origin}: longrope needs {config.head_dim // 2} factors in short_factor and long_factor"
            )
    if not len(config.sliding_windows) == len(config.rope_layers) == config.num_layers:
        raise StartupError(f"{origin}: layer_types and no_rope_layers must have {config.num_layers} entries")


def _sliding_windows(fields: ConfigJson) -> tuple[int | None, ...]:
    architecture, layers = fields.architectures[0], range(fields.num_hidden_layers)
    window = 4096 if fields.sliding_window is msgspec.UNSET else fields.sliding_window
    if architecture.startswith("Mistral"):
        return tuple(window for _ in layers)
    if architecture.startswith("Llama") or not fields.use_sliding_window:
        return tuple(None for _ in layers)
    if fields.layer_types is not None:
        return tuple(window if layer_type == "sliding_attention" else None for layer_type in fields.layer_types)
    if architecture.startswith("SmolLM3"):
        return tuple(None if rotates else window for rotates in _rope_layers(fields))
    return tuple(window if layer >= fields.max_window_layers else None for layer in layers)


def _rope_layers(fields: ConfigJson) -> tuple[bool, ...]:
    if not fields.architectures[0].startswith("SmolLM3"):
        return tuple(True for _ in range(fields.num_hidden_layers))
    if fields.no_rope_layers is not None:
        return tuple(bool(rotates) for rotates in fields.no_rope_layers)
    return tuple((layer + 1) % fields.no_rope_layer_interval != 0 for layer in range(fields.num_hidden_layers))
