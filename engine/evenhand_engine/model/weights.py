"""Weights: a checkpoint's tensors on the device, in the layout of its kernels. Each tensor is used exactly once."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evenhand_engine.errors import StartupError
from evenhand_engine.model.config import ModelConfig
from evenhand_engine.model.fp8_weights import has_fp8, read_fp8
from evenhand_engine.model.packed_format import Fp8Format, PackedFormat, QuantizedFormat
from evenhand_engine.model.packed_int import read_packed
from evenhand_engine.model.precision import Precision
from evenhand_engine.model.progress import Stage
from evenhand_engine.model.sharding import WHOLE, Shard, ShardedSource, TensorSource, row_parallel
from evenhand_kernels.kernels import Embedding, Kernels, Linear
from evenhand_kernels.quantized import QuantizedTensor, Weight, stacked, widened

MakeLinear = Callable[[Weight, Tensor | None], Linear]

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

PARTS = tuple(f".{field.name}" for field in fields(QuantizedTensor))
"""What follows a weight's name where a converted checkpoint holds it quantised, part by part."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. `qkv` gives query heads, key heads, value heads; `gate_up` gives silu(gate) * up.

    `key_scale` and `value_scale` are for an fp8 KV cache: what its numbers are multiplied with; None: the checkpoint names none.
    """

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear
    key_scale: float | None
    value_scale: float | None


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder. Norms are float32; a tied `embedding` and `lm_head` share one copy of their weight."""

    embedding: Embedding
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear


class Checkpoint:
    """The safetensors files of a model directory, memory mapped. A context manager.

    Every error in the files is a StartupError that names the file or the tensor.
    """

    def __init__(self, model_dir: Path, quantized_format: QuantizedFormat | None = None) -> None:
        """`quantized_format`: of the projections that it holds quantised."""
        self._model_dir = model_dir
        self._format = quantized_format
        self._stack = ExitStack()
        self._untaken: dict[str, Any] = {}
        for path, names in _shards(model_dir).items():
            file = self._open(path)
            held = set(file.keys())
            for name in held if names is None else names:
                if name not in held:
                    raise StartupError(f"{model_dir / INDEX_FILE}: {path.name} should hold tensor {name}, and does not")
                self._untaken[name] = file
        self._stage = Stage("loading the weights", total=len(self._untaken))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def take(self, name: str, *shape: int) -> Weight:
        """Raises StartupError if the tensor is missing or has another shape."""
        prefix = name.removesuffix(".weight")
        has = self._untaken.__contains__
        if isinstance(self._format, PackedFormat) and has(f"{prefix}.qweight"):
            weight: Weight = read_packed(self._read, has, prefix, self._format)
        elif isinstance(self._format, Fp8Format) and has_fp8(has, prefix):
            weight = read_fp8(self._read, has, prefix, self._format)
        elif has(f"{name}.codes"):
            parts = [part for part in PARTS if part == ".scales" or has(name + part)]
            weight = QuantizedTensor(**{part[1:]: self._read(name + part) for part in parts})
        else:
            weight = self._read(name)
        if tuple(weight.shape) != shape:
            raise StartupError(
                f"{self._model_dir}: tensor {name} has shape {list(weight.shape)}, but config.json asks for {list(shape)}"
            )
        return weight

    def take_scale(self, name: str) -> float | None:
        """Raises StartupError if the tensor has more than one number, or one that nothing can be divided by."""
        if name not in self._untaken:
            return None
        scale = self._read(name)
        if scale.numel() != 1 or not 0 < scale.item() < math.inf:
            raise StartupError(f"{self._model_dir}: tensor {name} should be one positive number, and is not")
        return float(scale.item())

    def _read(self, name: str) -> Tensor:
        self._stage.advance(1)
        file = self._untaken.pop(name, None)
        if file is None:
            raise StartupError(
                f"{self._model_dir}: the checkpoint has no tensor {name}, which its config.json asks for"
            )
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise StartupError(f"{self._model_dir}: tensor {name} cannot be read: {error}") from error
        return tensor

    def discard(self, name: str) -> None:
        """Ignore a tensor that a checkpoint may hold though nothing needs it."""
        for part in ("", *PARTS):
            self._untaken.pop(name + part, None)

    def require_all_taken(self) -> None:
        """Raises StartupError if the checkpoint holds tensors that the config does not explain."""
        rest = sorted(name for name in self._untaken if not name.endswith(".rotary_emb.inv_freq"))
        if rest:
            raise StartupError(
                f"{self._model_dir}: the checkpoint holds {len(rest)} tensors that its config.json does not explain, "
                f"first {rest[0]}"
            )

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError as error:
            raise StartupError(f"{path}: no such file") from error
        except (OSError, SafetensorError) as error:
            raise StartupError(f"{path}: not a complete safetensors file: {error}") from error


class RandomTensors:
    """Weights for `--load-format dummy`: the right shapes, small random values, norms of one.

    Large tensors repeat `LONGEST` numbers, so that a model of 8B is there in seconds.
    """

    LONGEST = (1 << 24) + 43  # divides no row, or rows would be equal

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def take(self, name: str, *shape: int) -> Tensor:
        if len(shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(shape)
        size = math.prod(shape)
        values = (torch.randn(min(size, self.LONGEST), generator=self._generator) * 0.02).to(self._dtype)
        if size > self.LONGEST:
            values = values.repeat(-(-size // self.LONGEST))[:size]
        return values.view(shape)

    def take_scale(self, name: str) -> None:
        """There is none."""


def load_weights(
    model_dir: Path, config: ModelConfig, precision: Precision, kernels: Kernels, shard: Shard = WHOLE
) -> Weights:
    """Read the checkpoint in `model_dir`. Raises StartupError for missing, unexpected, mis-shaped or torn tensors."""
    with Checkpoint(model_dir, config.quantized_format) as checkpoint:
        weights = assemble(checkpoint, config, precision, kernels, shard)
        if config.tie_word_embeddings:
            checkpoint.discard("lm_head.weight")
        checkpoint.require_all_taken()
    return weights


def assemble(
    source: TensorSource, config: ModelConfig, precision: Precision, kernels: Kernels, shard: Shard = WHOLE
) -> Weights:
    """Take every tensor of the model from `source`, fuse and pack them. `config` is that of the shard."""
    if shard.size > 1:
        source = ShardedSource(source, shard)
    vocabulary = (config.vocab_size, config.hidden_size)
    table = precision.of(source.take("model.embed_tokens.weight", *vocabulary))
    if config.tie_word_embeddings:
        embedding, lm_head = kernels.tied_embedding(table)
    else:
        embedding = kernels.embedding(table)
        lm_head = kernels.linear(precision.of(source.take("lm_head.weight", *vocabulary)), None)
    return Weights(
        embedding=embedding,
        layers=tuple(
            _layer(source, f"model.layers.{index}", config, precision, kernels, shard)
            for index in range(config.num_layers)
        ),
        norm=widened(source.take("model.norm.weight", config.hidden_size)).to(kernels.torch_device),
        lm_head=lm_head,
    )


def _layer(
    source: TensorSource, prefix: str, config: ModelConfig, precision: Precision, kernels: Kernels, shard: Shard
) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def vector(name: str, size: int) -> Tensor:
        return widened(source.take(f"{prefix}.{name}", size)).to(kernels.torch_device)

    def norm(name: str, size: int) -> Tensor:
        return vector(f"{name}.weight", size)

    def projection(
        names: str, in_features: int, out_features: Sequence[int], bias: bool, make: MakeLinear = kernels.linear
    ) -> Linear:
        """The projections of these names in one."""
        parts = list(zip(names.split(), out_features, strict=True))
        weights = [precision.of(source.take(f"{prefix}.{name}.weight", size, in_features)) for name, size in parts]
        biases = [vector(f"{name}.bias", size) for name, size in parts if bias]
        return make(stacked(weights), torch.cat(biases) if biases else None)

    add_up = row_parallel(kernels.linear, shard)
    qkv = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
    return LayerWeights(
        input_norm=norm("input_layernorm", hidden),
        qkv=projection(qkv, hidden, (query, key_value, key_value), config.attention_bias),
        q_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
        output=projection("self_attn.o_proj", query, (hidden,), config.attention_output_bias, add_up),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=projection("mlp.gate_proj mlp.up_proj", hidden, (inner, inner), config.mlp_bias, kernels.gated_linear),
        down=projection("mlp.down_proj", inner, (hidden,), config.mlp_bias, add_up),
        key_scale=source.take_scale(f"{prefix}.self_attn.k_scale"),
        value_scale=source.take_scale(f"{prefix}.self_attn.v_scale"),
    )


def checkpoint_bytes(model_dir: Path) -> int:
    """Size of the files of a checkpoint. Raises StartupError if one of them is missing."""
    try:
        return sum(path.stat().st_size for path in _shards(model_dir))
    except FileNotFoundError as error:
        raise StartupError(f"{error.filename}: no such file") from error


def _shards(model_dir: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that its index has it for; None: all that it holds."""
    index = model_dir / INDEX_FILE
    if not index.is_file():
        if not (model_dir / WEIGHTS_FILE).is_file():
            raise StartupError(
                f"model {model_dir}: no {WEIGHTS_FILE} and no {INDEX_FILE}; weights in other formats are not supported"
            )
        return {model_dir / WEIGHTS_FILE: None}
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=dict[str, object])["weight_map"]
        files = msgspec.convert(weight_map, dict[str, str])
    except (KeyError, msgspec.MsgspecError) as error:
        raise StartupError(f"{index}: no valid weight map: {error}") from error
    return {model_dir / file: {name for name in files if files[name] == file} for file in sorted(set(files.values()))}
