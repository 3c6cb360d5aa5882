"""The tensors of a GGUF file: which names and shapes a supported architecture has, and which storage can be read."""

from gguf import GGMLQuantizationType as Kind
from gguf import ReaderTensor

from evenhand_engine.model.config import ModelConfig
from evenhand_engine.model.gguf.config import ROPE_TENSORS
from evenhand_engine.model.gguf.file import GgufFile

MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names to Hugging Face's; a layer's stand between `blk.N.` and `.weight` or `.bias`."""

STORAGE = frozenset(
    {Kind.F32, Kind.F16, Kind.BF16}
    | {Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0}
    | {Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K}
    | {Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL}
    | {Kind.IQ4_XS, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4}
)
"""Kinds that can be read: those that llama.cpp stores weights in. Q8_1 and Q8_K are of its activations alone."""


def hugging_face_name(name: str) -> str:
    """Of a tensor that `check_tensors` let pass."""
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{suffix}"


def check_tensors(file: GgufFile, config: ModelConfig) -> None:
    """Raises StartupError that names the first tensor that is missing, unknown, of another shape or unreadable."""
    expected = expected_shapes(config)
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in ROPE_TENSORS}
    for name in expected:
        if name not in tensors:
            raise file.error(f"has no tensor {name}, which a {file.architecture} model of its keys needs: get it anew")
    for name, tensor in tensors.items():
        if name not in expected:
            raise file.error(
                f"has a tensor {name}, which no {file.architecture} model of its keys has: this variant is not supported"
            )
        if _shape(tensor) != expected[name]:
            raise file.error(
                f"has a tensor {name} of shape {list(_shape(tensor))}, but its keys ask for {list(expected[name])}"
            )
        if tensor.tensor_type not in STORAGE:
            raise file.error(
                f"stores tensor {name} as {tensor.tensor_type.name}, which is not supported: quantise the model to "
                "another kind, like Q8_0 or Q4_K"
            )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the model, by llama.cpp's name; [rows, columns]."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    query, key_value = config.num_heads * head, config.num_kv_heads * head
    embedding = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": embedding, "output_norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["output.weight"] = embedding
    projections = {
        "attn_q": (query, hidden, config.attention_bias),
        "attn_k": (key_value, hidden, config.attention_bias),
        "attn_v": (key_value, hidden, config.attention_bias),
        "attn_output": (hidden, query, config.attention_output_bias),
        "ffn_gate": (inner, hidden, config.mlp_bias),
        "ffn_up": (inner, hidden, config.mlp_bias),
        "ffn_down": (hidden, inner, config.mlp_bias),
    }
    norms = {"attn_norm": hidden, "ffn_norm": hidden} | (
        {"attn_q_norm": head, "attn_k_norm": head} if config.qk_norm else {}
    )
    for layer in range(config.num_layers):
        for name, size in norms.items():
            shapes[f"blk.{layer}.{name}.weight"] = (size,)
        for name, (rows, columns, bias) in projections.items():
            shapes[f"blk.{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"blk.{layer}.{name}.bias"] = (rows,)
    return shapes


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """[rows, columns]; a GGUF file has them the other way round."""
    return tuple(int(size) for size in reversed(tensor.shape))
