"""The `config.json` of a GGUF file: what its keys say of the model's shape, in Hugging Face's words."""

import math
from typing import Any

from gguf import Keys

from evenhand_engine.model.gguf.file import GgufFile
from evenhand_engine.model.gguf.tokenizer import Vocabulary

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""llama.cpp's name to Hugging Face's. Mistral models come as llama."""

ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_FACTORS_SHORT = "rope_factors_short.weight"
ROPE_FACTORS_LONG = "rope_factors_long.weight"
ROPE_TENSORS = frozenset({ROPE_FREQUENCIES, ROPE_FACTORS_SHORT, ROPE_FACTORS_LONG})
"""What is in the config and not in the weights afterwards."""


def hugging_face_config(file: GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """Raises StartupError that names the key that is missing, malformed or cannot be honoured."""
    num_heads = file.require_count(Keys.Attention.HEAD_COUNT)
    hidden_size = file.require_count(Keys.LLM.EMBEDDING_LENGTH)
    head_dim = file.count(Keys.Attention.KEY_LENGTH) or hidden_size // num_heads
    for key in (Keys.Attention.VALUE_LENGTH, Keys.Rope.DIMENSION_COUNT):
        if (length := file.get(key, int)) not in (None, head_dim):
            raise file.error(
                f"has {file.name_of(key)} = {length}, which is not supported: it must be {head_dim} as the head's"
            )
    return {
        "architectures": [ARCHITECTURES[file.architecture]],
        "model_type": file.architecture,
        "vocab_size": len(vocabulary.tokens),
        "hidden_size": hidden_size,
        "intermediate_size": file.require_count(Keys.LLM.FEED_FORWARD_LENGTH),
        "num_hidden_layers": file.require_count(Keys.LLM.BLOCK_COUNT),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.count(Keys.Attention.HEAD_COUNT_KV) or num_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.require_count(Keys.LLM.CONTEXT_LENGTH),
        "rms_norm_eps": file.require(Keys.Attention.LAYERNORM_RMS_EPS, float),
        "rope_parameters": _rope_parameters(file),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": vocabulary.special_ids.get("bos_token"),
        "eos_token_id": vocabulary.special_ids.get("eos_token"),
    }


def _rope_parameters(file: GgufFile) -> dict[str, Any]:
    """A frequency's divisor is written as longrope has it: Llama 3's scaling comes as one for each frequency too."""
    context_length = file.require_count(Keys.LLM.CONTEXT_LENGTH)
    parameters: dict[str, Any] = {
        "rope_theta": file.get(Keys.Rope.FREQ_BASE, float) or 10000.0,
        "original_max_position_embeddings": file.count(Keys.Rope.SCALING_ORIG_CTX_LEN) or context_length,
    }
    kind = file.get(Keys.Rope.SCALING_TYPE, str) or "none"
    factor = file.get(Keys.Rope.SCALING_FACTOR, float) or 1.0
    attention_factor = file.get(Keys.Rope.SCALING_ATTN_FACTOR, float) or 1.0
    used: set[str] = set()
    match kind:
        case "none" if ROPE_FREQUENCIES in file.tensors:
            used = {ROPE_FREQUENCIES}
            factors = file.tensors[ROPE_FREQUENCIES].data.tolist()
            scaling = {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
            }
        case "longrope" if ROPE_FACTORS_SHORT in file.tensors and ROPE_FACTORS_LONG in file.tensors:
            used = {ROPE_FACTORS_SHORT, ROPE_FACTORS_LONG}
            scaling = {
                "rope_type": kind,
                "short_factor": file.tensors[ROPE_FACTORS_SHORT].data.tolist(),
                "long_factor": file.tensors[ROPE_FACTORS_LONG].data.tolist(),
                "attention_factor": attention_factor,
            }
        case "longrope":
            raise file.error(f"lacks {ROPE_FACTORS_SHORT} or {ROPE_FACTORS_LONG}, which its longrope scaling needs")
        case "none":
            scaling = {"rope_type": "default"}
        case "linear":
            scaling = {"rope_type": kind, "factor": factor}
        case "yarn":
            attention_factor *= 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
            scaling = {"rope_type": kind, "factor": factor, "attention_factor": attention_factor}
            scaling["beta_fast"] = file.get(Keys.Rope.SCALING_YARN_BETA_FAST, float) or 32.0
            scaling["beta_slow"] = file.get(Keys.Rope.SCALING_YARN_BETA_SLOW, float) or 1.0
        case _:
            raise file.error(
                f"has {file.name_of(Keys.Rope.SCALING_TYPE)} {kind!r}, which is not supported; supported are none, linear, "
                "yarn, longrope"
            )
    if ignored := sorted((ROPE_TENSORS & file.tensors.keys()) - used):
        raise file.error(
            f"has a tensor {ignored[0]}, which its {file.name_of(Keys.Rope.SCALING_TYPE)} {kind!r} does not use: "
            "this variant is not supported"
        )
    return parameters | scaling
