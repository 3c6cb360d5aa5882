"""Converts a GGUF file into a Hugging Face style directory: config, safetensors weights, tokenizer.

The `gguf` library reads and dequantises. Tensors of 16 or 32 bits keep their type. Quantised ones become float32,
which loses nothing, up to FLOAT32_MAX_PARAMETERS in all; above that float16, whose rounding is far below the
quantisation's. Everything is checked before anything is written.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor, dequantize
from safetensors.torch import save_file

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config import ModelConfig, parse_model_config
from evenhand_engine.model.gguf.config import ARCHITECTURES, ROPE_TENSORS, hugging_face_config
from evenhand_engine.model.gguf.file import GgufFile
from evenhand_engine.model.gguf.tensors import check_tensors, hugging_face_name
from evenhand_engine.model.gguf.tokenizer import build_tokenizer, read_vocabulary, tokenizer_config
from evenhand_engine.model.progress import Progress

FLOAT32_MAX_PARAMETERS = 1_000_000_000
SHARD_BYTES = 2 << 30


def convert_gguf(gguf_path: Path, directory: Path, progress: Progress) -> None:
    """Write the model in `gguf_path`, or in the parts that it is one of, to the existing, empty `directory`.

    Raises StartupError that names the file and what in it cannot be read or is not supported.
    """
    advance = progress.stage(f"Reading {gguf_path.name}", total=1)
    file = GgufFile(gguf_path)
    if file.architecture not in ARCHITECTURES:
        raise StartupError(
            f"model {gguf_path}: architecture {file.architecture} is not supported; "
            f"supported in GGUF files are {', '.join(ARCHITECTURES)}"
        )
    vocabulary = read_vocabulary(file)
    document = hugging_face_config(file, vocabulary)
    config = parse_model_config(document, f"model {gguf_path}")
    check_tensors(file, config)
    advance(1)

    advance = progress.stage("Converting the tokenizer", total=1)
    build_tokenizer(file, vocabulary).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(file, vocabulary))
    advance(1)

    dtype = _storage_dtype(file.tensors["blk.0.attn_q.weight"], file.tensors)
    _write_json(directory / "config.json", document | {"dtype": str(dtype).removeprefix("torch.")})
    _write_json(directory / "generation_config.json", {"eos_token_id": sorted(vocabulary.end_ids)})
    _convert_weights(file, config, directory, progress)


def _convert_weights(file: GgufFile, config: ModelConfig, directory: Path, progress: Progress) -> None:
    """Write `model.safetensors`, or several such files and their index where one would be too large to hold."""
    advance = progress.stage("Converting the weights", total=len(file.tensors))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(file, config)):
        file_name = "model.safetensors" if number == 0 else f"model-{number:05}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
        advance(len(shard))
    if len(set(weight_map.values())) > 1:
        _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _shards(file: GgufFile, config: ModelConfig) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in file.tensors.items():
        if name in ROPE_TENSORS:
            continue  # in the config
        weight = _to_torch(tensor).to(_storage_dtype(tensor, file.tensors))
        if file.architecture == "llama" and ".attn_q." in name:
            weight = _rotate_half_order(weight, config.num_heads)
        elif file.architecture == "llama" and ".attn_k." in name:
            weight = _rotate_half_order(weight, config.num_kv_heads)
        shard[hugging_face_name(name)] = weight
        size += weight.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


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
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
