"""Converts a GGUF file into a Hugging Face style directory: config, safetensors weights, tokenizer.

Tensors keep their type: a quantised NAME is written as NAME.codes, NAME.scales and, if it has them, NAME.minima.
Everything is checked before anything is written.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config import ModelConfig, parse_model_config
from evenhand_engine.model.gguf.blocks import read_tensor
from evenhand_engine.model.gguf.config import ARCHITECTURES, ROPE_TENSORS, hugging_face_config
from evenhand_engine.model.gguf.file import GgufFile
from evenhand_engine.model.gguf.tensor_names import check_tensors, hugging_face_name
from evenhand_engine.model.gguf.tokenizer import build_tokenizer, read_vocabulary, tokenizer_config
from evenhand_engine.model.progress import Progress
from evenhand_kernels.quantized import QuantizedTensor, Weight

SHARD_BYTES = 2 << 30
DTYPES = {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.BF16: "bfloat16"}
"""What the config says about weights of a kind, which sets the KV cache's too; of all others, float16."""


def convert_gguf(gguf_path: Path, directory: Path, progress: Progress) -> None:
    """Write the model in `gguf_path`, or in the parts that it is one of, to the existing, empty `directory`.

    Raises StartupError that names the file and what in it cannot be read or is not supported.
    """
    advance = progress.stage(f"reading {gguf_path.name}", total=1)
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

    advance = progress.stage("converting the tokenizer", total=1)
    build_tokenizer(file, vocabulary).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(file, vocabulary))
    advance(1)

    dtype = DTYPES.get(file.tensors["blk.0.attn_q.weight"].tensor_type, "float16")
    _write_json(directory / "config.json", document | {"dtype": dtype})
    _write_json(directory / "generation_config.json", {"eos_token_id": sorted(vocabulary.end_ids)})
    _convert_weights(file, config, directory, progress)


def _convert_weights(file: GgufFile, config: ModelConfig, directory: Path, progress: Progress) -> None:
    """Write `model.safetensors`, or several such files and their index where one would be too large to hold."""
    advance = progress.stage("converting the weights", total=len(file.tensors))
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
        weight = read_tensor(tensor)
        if file.architecture == "llama" and ".attn_q." in name:
            weight = _rotate_half_order(weight, config.num_heads)
        elif file.architecture == "llama" and ".attn_k." in name:
            weight = _rotate_half_order(weight, config.num_kv_heads)
        parts = _parts(hugging_face_name(name), weight)
        shard |= parts
        size += sum(part.nbytes for part in parts.values())
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _parts(name: str, weight: Weight) -> dict[str, torch.Tensor]:
    if not isinstance(weight, QuantizedTensor):
        return {name: weight}
    return {f"{name}.{part}": tensor for part, tensor in weight.parts().items()}


def _rotate_half_order(weight: Weight, num_heads: int) -> Weight:
    """Undo GGUF's order of the rows of q and k, where the two numbers that RoPE rotates together are neighbours."""
    order = torch.arange(weight.shape[0]).view(num_heads, -1, 2).transpose(1, 2).flatten()
    return weight.rows(order) if isinstance(weight, QuantizedTensor) else weight[order]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
