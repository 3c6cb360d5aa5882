"""Converts a GGUF file into a Hugging Face style directory: config, safetensors weights, tokenizer.

The `gguf` library reads and dequantises, `transformers` rebuilds the tokenizer. Tensors of 16 or 32 bits keep their
type. Quantised ones become float32, which loses nothing, up to FLOAT32_MAX_PARAMETERS in all; above that float16,
whose rounding is far below the quantisation's.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from safetensors.torch import save_file

from evenhand_engine.errors import StartupError
from evenhand_engine.model.progress import Progress

FLOAT32_MAX_PARAMETERS = 1_000_000_000
SHARD_BYTES = 2 << 30

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF's name to Hugging Face's. Mistral models come as llama."""

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
ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(gguf_path: Path, directory: Path, progress: Progress) -> None:
    """Write the model in `gguf_path` to the existing, empty `directory`.

    Raises StartupError for a file that cannot be read and for an architecture that is not supported.
    """
    advance = progress.stage(f"Reading {gguf_path.name}", total=1)
    try:
        reader = GGUFReader(gguf_path)
    except (ValueError, IndexError, KeyError) as error:
        raise StartupError(f"model {gguf_path}: not a readable GGUF file, maybe truncated: {error}") from error
    metadata = _Metadata(reader, gguf_path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _generation_config(metadata))
    advance(1)
    _convert_tokenizer(gguf_path, directory, progress)
    _convert_weights(tensors, config, directory, progress)


class _Metadata:
    """The key-value section. Keys without a dot at their start are those of the architecture."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._reader = reader
        self._path = path
        self.architecture = self._read("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise StartupError(
                f"model {path}: architecture {self.architecture} is not supported; "
                f"supported in GGUF files are {', '.join(ARCHITECTURES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{architecture}.{key}`."""
        return self._read(f"{self.architecture}.{key}", default)

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise StartupError(f"model {self._path}: the GGUF file lacks {self.architecture}.{key}")
        return value

    def tokenizer(self, key: str) -> Any:
        """The value of `tokenizer.ggml.{key}`, None if absent."""
        return self._read(f"tokenizer.ggml.{key}")

    def _read(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()


def _config(metadata: _Metadata, tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    num_heads = metadata.require("attention.head_count")
    hidden_size = metadata.require("embedding_length")
    head_dim = metadata.get("attention.key_length") or metadata.get("rope.dimension_count") or hidden_size // num_heads
    context_length = metadata.require("context_length")
    return {
        "architectures": [ARCHITECTURES[metadata.architecture]],
        "model_type": metadata.architecture,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.require("feed_forward_length"),
        "num_hidden_layers": metadata.require("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": metadata.require("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(metadata, tensors, context_length),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": str(_storage_dtype(tensors["blk.0.attn_q.weight"], tensors)).removeprefix("torch."),
        "bos_token_id": metadata.tokenizer("bos_token_id"),
        "eos_token_id": metadata.tokenizer("eos_token_id"),
    }


def _rope_parameters(metadata: _Metadata, tensors: dict[str, ReaderTensor], context_length: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get("rope.freq_base", 10000.0)}
    if ROPE_FACTORS in tensors:  # Llama 3's scaling comes as one divisor for each frequency, like LongRoPE's
        factors = tensors[ROPE_FACTORS].data.tolist()
        parameters |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        parameters |= {"attention_factor": 1.0, "original_max_position_embeddings": context_length}
        return parameters
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling != "none":
        original = metadata.get("rope.scaling.original_context_length", context_length)
        parameters |= {"rope_type": scaling, "factor": metadata.get("rope.scaling.factor", 1.0)}
        parameters["original_max_position_embeddings"] = original
    return parameters


def _generation_config(metadata: _Metadata) -> dict[str, Any]:
    ends = [metadata.tokenizer(key) for key in ("eos_token_id", "eot_token_id")]
    eos_token_ids = sorted({token_id for token_id in ends if token_id is not None})
    return {"bos_token_id": metadata.tokenizer("bos_token_id"), "eos_token_id": eos_token_ids}


def _convert_tokenizer(gguf_path: Path, directory: Path, progress: Progress) -> None:
    advance = progress.stage("Converting the tokenizer", total=1)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise StartupError(f"model {gguf_path}: its tokenizer is not supported: {error}") from error
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    advance(1)


def _convert_weights(
    tensors: dict[str, ReaderTensor], config: dict[str, Any], directory: Path, progress: Progress
) -> None:
    """Write `model.safetensors`, or several such files and their index where one would be too large to hold."""
    advance = progress.stage("Converting the weights", total=len(tensors))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(tensors, config)):
        file_name = "model.safetensors" if number == 0 else f"model-{number:05}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
        advance(len(shard))
    if len(set(weight_map.values())) > 1:
        _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(tensors: dict[str, ReaderTensor], config: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue  # in the config
        weight = _to_torch(tensor).to(_storage_dtype(tensor, tensors))
        if config["model_type"] == "llama" and ".attn_q." in name:
            weight = _rotate_half_order(weight, config["num_attention_heads"])
        elif config["model_type"] == "llama" and ".attn_k." in name:
            weight = _rotate_half_order(weight, config["num_key_value_heads"])
        shard[_hugging_face_name(name)] = weight
        size += weight.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _hugging_face_name(name: str) -> str:
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    _, layer, kind, suffix = name.split(".")
    if kind not in LAYER_TENSORS:
        raise StartupError(f"the GGUF file has a tensor {name}, which no supported architecture has")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.{suffix}"


def _to_torch(tensor: ReaderTensor) -> torch.Tensor:
    """The values as float32, in the order [rows, columns]; a copy, since the file's mapping is read-only."""
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def _storage_dtype(tensor: ReaderTensor, tensors: dict[str, ReaderTensor]) -> torch.dtype:
    match tensor.tensor_type:
        case GGMLQuantizationType.BF16:
            return torch.bfloat16
        case GGMLQuantizationType.F16:
            return torch.float16
        case GGMLQuantizationType.F32:
            return torch.float32
    num_parameters = sum(int(other.n_elements) for other in tensors.values())
    return torch.float32 if num_parameters <= FLOAT32_MAX_PARAMETERS else torch.float16


def _rotate_half_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo GGUF's order of the rows of q and k, where the two numbers that RoPE rotates together are neighbours."""
    pairs = weight.view(num_heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
