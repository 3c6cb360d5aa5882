"""A GGUF file that does not fit together is refused in one line that names what; a split one is whole from any part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from evenhand_engine.errors import StartupError
from evenhand_engine.model import weights
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.gguf.tensor_names import STORAGE
from evenhand_engine.model.rope_config import RopeConfig
from evenhand_engine.model.source import resolve_model_dir
from evenhand_kernels.quantized import widened

HIDDEN, INNER, VOCABULARY = 64, 256, ["<|end|>", "<|start|>", "a", "b", "ab"]
HEAD_DIM = 32
KEYS: dict[str, Any] = {
    "llama.context_length": 256,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": 2,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(size=(rows, columns)).astype(np.float32)

    found = {"token_embd.weight": matrix(len(VOCABULARY), HIDDEN), "output_norm.weight": np.ones(HIDDEN, np.float32)}
    shapes = {"attn_q": (64, HIDDEN), "attn_k": (32, HIDDEN), "attn_v": (32, HIDDEN), "attn_output": (HIDDEN, 64)}
    shapes |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    for layer in range(2):
        found |= {f"blk.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        found |= {f"blk.{layer}.{name}.weight": np.ones(HIDDEN, np.float32) for name in ("attn_norm", "ffn_norm")}
    return found


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model with other keys or tensors (None: without it), some stored raw as another kind."""

    def write_model(
        keys: dict[str, Any] | None = None,
        changed: dict[str, np.ndarray | None] | None = None,
        raw: dict[str, tuple[np.ndarray, Kind]] | None = None,
        split: int = 0,
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=split)
        for key, value in (KEYS | (keys or {})).items():
            if value is not None:
                kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
                kinds |= {str: writer.add_string, list: writer.add_array}
                kinds[type(value)](key, value)
        for name, tensor in (tensors() | (changed or {})).items():
            if raw and name in raw:
                writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
            elif tensor is not None:
                writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "tiny.gguf"

    return write_model


def blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Random bytes of that kind, whose scales are small numbers in whatever float they are."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(3).integers(0, 60, size=(rows, columns // block_size * type_size), dtype=np.uint8)


@pytest.mark.parametrize(
    "keys, changed, message",
    [
        (
            {},
            {"blk.0.ffn_gate.0.weight": np.ones((INNER, HIDDEN))},
            r"a tensor blk\.0\.ffn_gate\.0\.weight, which no llama",
        ),
        (
            {},
            {"rope_factors_long.weight": np.ones(16)},
            r"a tensor rope_factors_long\.weight, which its llama\.rope\.scaling",
        ),
        ({}, {"blk.2.attn_q.weight": np.ones((64, HIDDEN))}, r"a tensor blk\.2\.attn_q\.weight, which no llama"),
        ({}, {"token_embd.weight": None}, r"has no tensor token_embd\.weight"),
        ({}, {"blk.0.attn_q.weight": None}, r"has no tensor blk\.0\.attn_q\.weight"),
        ({}, {"blk.1.ffn_up.weight": None}, r"has no tensor blk\.1\.ffn_up\.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(64)}, r"has no tensor blk\.0\.attn_k\.bias"),
        ({}, {"blk.1.attn_k.weight": np.ones((64, HIDDEN))}, r"attn_k\.weight of shape \[64, 64\], but .* \[32, 64\]"),
        ({"llama.block_count": 3}, {}, r"has no tensor blk\.2\.attn_norm\.weight"),
        ({"llama.block_count": 0}, {}, r"has llama\.block_count = 0, which must be at least 1"),
        ({"llama.attention.head_count": 0}, {}, r"llama\.attention\.head_count = 0"),
        ({"llama.attention.head_count": None}, {}, r"lacks llama\.attention\.head_count, which every model needs"),
        (
            {"llama.attention.head_count_kv": [1, 1]},
            {},
            r"llama\.attention\.head_count_kv is malformed: Expected `int`",
        ),
        ({"llama.rope.dimension_count": 16}, {}, r"llama\.rope\.dimension_count = 16, .* must be 32"),
        ({"llama.attention.value_length": 16}, {}, r"llama\.attention\.value_length = 16, .* must be 32"),
        ({"llama.rope.scaling.type": "mystery"}, {}, r"llama\.rope\.scaling\.type 'mystery', which is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, {}, r"lacks rope_factors_short\.weight or rope_factors_long\.weight"),
        ({"tokenizer.ggml.eos_token_id": 1_000_000}, {}, r"tokenizer\.ggml\.eos_token_id = 1000000, but only 5 tokens"),
        ({"tokenizer.ggml.bos_token_id": 1_000_000}, {}, r"tokenizer\.ggml\.bos_token_id = 1000000"),
        ({"tokenizer.ggml.padding_token_id": 1_000_000}, {}, r"tokenizer\.ggml\.padding_token_id = 1000000"),
        ({"tokenizer.ggml.tokens": [*VOCABULARY, "c"]}, {}, r"token_embd\.weight of shape \[5, 64\], but .* \[6, 64\]"),
    ],
)
def test_what_does_not_fit_is_named(
    write: Callable[..., Path], keys: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    path = write(keys, {name: None if t is None else t.astype(np.float32) for name, t in changed.items()})
    with pytest.raises(StartupError, match=message) as caught:
        resolve_model_dir(str(path))
    assert str(caught.value).startswith(f"model {path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Kind.Q8_K, Kind.Q8_1])
def test_a_kind_that_is_no_weights_is_refused_by_name(write: Callable[..., Path], kind: Kind) -> None:
    name = "blk.0.ffn_down.weight"
    path = write(raw={name: (blocks(kind, HIDDEN, INNER), kind)})
    with pytest.raises(StartupError, match=rf"stores tensor {name} as {kind.name}, which is not supported: quantise"):
        resolve_model_dir(str(path))


@pytest.mark.parametrize("kind", sorted(STORAGE), ids=lambda kind: kind.name)
def test_every_kind_that_is_listed_can_be_read(write: Callable[..., Path], kind: Kind) -> None:
    name = "blk.0.ffn_down.weight"
    values = np.random.default_rng(2).normal(size=(HIDDEN, INNER)).astype(np.float32)
    if kind in (Kind.F32, Kind.F16):
        stored = values.astype(np.float32 if kind == Kind.F32 else np.float16)
    else:
        try:
            stored = gguf.quantize(values, kind)
        except NotImplementedError:
            stored = blocks(kind, HIDDEN, INNER)
    model_dir = resolve_model_dir(str(write(raw={name: (stored, kind)})))
    expected = torch.from_numpy(gguf.dequantize(stored, kind).astype(np.float32))
    with weights.Checkpoint(model_dir) as checkpoint:
        weight = widened(checkpoint.take("model.layers.0.mlp.down_proj.weight", HIDDEN, INNER))
    assert torch.allclose(weight, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


YARN = {"rope_type": "yarn", "theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = tuple(1.0 + 0.25 * i for i in range(16))


@pytest.mark.parametrize(
    "keys, changed, expected",
    [
        ({}, {}, RopeConfig("default", 1e4, 1.0, 256)),
        ({"llama.rope.freq_base": 5e5}, {}, RopeConfig("default", 5e5, 1.0, 256)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {},
            RopeConfig("linear", 1e4, 2.0, 256),
        ),
        (
            {
                "llama.rope.freq_base": 5e5,
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
            },
            {},
            RopeConfig(**YARN, attention_factor=1.1386294361119891, beta_fast=16.0),
        ),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.original_context_length": 64},
            {
                "rope_factors_short.weight": np.ones(16, np.float32),
                "rope_factors_long.weight": np.array(FACTORS, np.float32),
            },
            RopeConfig("longrope", 1e4, 4.0, 64, 1.0, short_factor=(1.0,) * 16, long_factor=FACTORS),
        ),
        (
            {},
            {"rope_freqs.weight": np.array(FACTORS, np.float32)},
            RopeConfig("longrope", 1e4, 1.0, 256, 1.0, short_factor=FACTORS, long_factor=FACTORS),
        ),
    ],
)
def test_rope_scaling_is_read(
    write: Callable[..., Path], keys: dict[str, Any], changed: dict[str, Any], expected: RopeConfig
) -> None:
    assert load_model_config(resolve_model_dir(str(write(keys, changed)))).rope == expected


def test_a_split_file_is_whole_from_any_part(write: Callable[..., Path]) -> None:
    whole = load_file(resolve_model_dir(str(write())) / "model.safetensors")
    path = write(split=7)
    path.unlink(missing_ok=True)
    parts = sorted(path.parent.glob("tiny-*.gguf"))
    assert len(parts) == 3
    directories = {resolve_model_dir(str(part)) for part in parts}
    assert len(directories) == 1
    assert {name: t.tolist() for name, t in load_file(directories.pop() / "model.safetensors").items()} == {
        name: t.tolist() for name, t in whole.items()
    }


def test_a_part_that_is_missing_or_renamed_is_named(write: Callable[..., Path]) -> None:
    path = write(split=7)
    first, second, third = sorted(path.parent.glob("tiny-*.gguf"))
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(StartupError, match=r"part tiny-00002-of-00003\.gguf is missing beside it: all 3 parts"):
        resolve_model_dir(str(third))
    second.write_bytes(third.read_bytes())
    with pytest.raises(StartupError, match=r"tensor .* is in another part"):
        resolve_model_dir(str(first))
    second.write_bytes(kept)
    first, third = first.rename(path.with_name("alone.gguf")), third
    with pytest.raises(StartupError, match=r"alone\.gguf: its keys say that it is one of 3 parts, its name"):
        resolve_model_dir(str(first))
