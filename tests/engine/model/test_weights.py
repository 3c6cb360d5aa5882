"""A checkpoint that does not match its config is refused with one clear message."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import load_model
from evenhand_engine.errors import StartupError
from evenhand_engine.model import memory, weights
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.precision import Precision
from evenhand_engine.model.weights import load_weights
from evenhand_kernels.reference import ReferenceKernels

Checkpoint = Callable[..., tuple[Path, PreTrainedModel]]
Edit = Callable[[dict[str, Tensor]], object]
NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def model_dir(checkpoint: Checkpoint) -> Path:
    return checkpoint(LlamaConfig)[0]


def edit(model_dir: Path, change: Edit) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, model_dir / "model.safetensors")


def load(model_dir: Path, **options: object) -> None:
    load_model(EngineConfig(model=str(model_dir), **({"kv_cache_bytes": 1 << 20} | options)))  # type: ignore[arg-type]


def assert_refused(model_dir: Path, message: str, **options: object) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        load(model_dir, **options)
    assert "\n" not in str(caught.value)


def test_a_good_checkpoint_loads(model_dir: Path) -> None:
    load(model_dir)


def test_a_missing_tensor(model_dir: Path) -> None:
    edit(model_dir, lambda tensors: tensors.pop(NAME))
    assert_refused(model_dir, f"has no tensor {NAME}")


def test_a_tensor_of_another_shape(model_dir: Path) -> None:
    edit(model_dir, lambda tensors: tensors.update({NAME: tensors[NAME][:-1].contiguous()}))
    assert_refused(model_dir, rf"tensor {NAME} has shape \[135, 96\], but config.json asks for \[136, 96\]")


def test_a_tensor_that_nothing_explains(model_dir: Path) -> None:
    extra = "model.layers.0.self_attn.q_proj.bias"
    edit(model_dir, lambda tensors: tensors.update({extra: torch.zeros(192)}))
    assert_refused(model_dir, f"1 tensors that its config.json does not explain, first {extra}")


def test_what_old_checkpoints_hold_beside_the_weights_is_ignored(checkpoint: Checkpoint) -> None:
    model_dir, _ = checkpoint(LlamaConfig, tie_word_embeddings=True)
    leftovers = {
        "lm_head.weight": torch.zeros(199, 96),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16),
    }
    edit(model_dir, lambda tensors: tensors.update(leftovers))
    load(model_dir)


@pytest.mark.parametrize("numbers", [[0.5, 0.5], [0.0], [-1.0], [float("nan")], [float("inf")]])
def test_a_scale_of_a_kv_cache_that_is_none(model_dir: Path, numbers: list[float]) -> None:
    scale = {"model.layers.1.self_attn.v_scale": torch.tensor(numbers)}
    edit(model_dir, lambda tensors: tensors.update(scale))
    assert_refused(model_dir, r"tensor model\.layers\.1\.self_attn\.v_scale should be one positive number, and is not")


@pytest.mark.parametrize("num_bytes", [0, 7, 1000, -100])
def test_a_truncated_file(model_dir: Path, num_bytes: int) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert_refused(model_dir, r"model\.safetensors: not a complete safetensors file")


def test_scales_of_a_kv_cache_are_read(model_dir: Path) -> None:
    edit(model_dir, lambda tensors: tensors.update({"model.layers.1.self_attn.v_scale": torch.tensor(0.25)}))
    layers = load_weights(model_dir, load_model_config(model_dir), Precision(), ReferenceKernels()).layers
    assert [(layer.key_scale, layer.value_scale) for layer in layers[:2]] == [(None, None), (None, 0.25)]


def test_no_weights_at_all(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    assert_refused(model_dir, r"no model\.safetensors and no model\.safetensors\.index\.json")


@pytest.fixture
def sharded_dir(model_dir: Path) -> Path:
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file_name, members in shards.items():
        save_file({name: tensors[name] for name in members}, model_dir / file_name)
    weight_map = {name: file_name for file_name, members in shards.items() for name in members}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model_dir


def test_several_files_load_by_their_index(sharded_dir: Path) -> None:
    load(sharded_dir)


def test_the_index_decides_which_of_two_shards_a_tensor_is_from(sharded_dir: Path) -> None:
    name = "model.norm.weight"
    index = json.loads((sharded_dir / "model.safetensors.index.json").read_text())
    first, other = index["weight_map"][name], {"a.safetensors", "b.safetensors"} - {index["weight_map"][name]}
    tensors = load_file(sharded_dir / other.copy().pop())
    save_file(tensors | {name: torch.full((96,), 7.0)}, sharded_dir / other.pop())
    expected = load_file(sharded_dir / first)[name]
    with weights.Checkpoint(sharded_dir) as checkpoint:
        assert torch.equal(checkpoint.take(name, 96), expected)


def test_an_index_that_names_the_wrong_shard(sharded_dir: Path) -> None:
    path = sharded_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[index["weight_map"][NAME]]
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {NAME: wrong}}))
    assert_refused(sharded_dir, rf"index\.json: {wrong} should hold tensor {NAME}, and does not")


def test_a_missing_shard(sharded_dir: Path) -> None:
    (sharded_dir / "b.safetensors").unlink()
    assert_refused(sharded_dir, r"b\.safetensors: no such file")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": ["a"]}'])
def test_a_broken_index(sharded_dir: Path, content: str) -> None:
    (sharded_dir / "model.safetensors.index.json").write_text(content)
    assert_refused(sharded_dir, r"model\.safetensors\.index\.json: no valid weight map")


def test_dummy_weights_need_only_a_config(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    load(model_dir, load_format="dummy")


def test_too_little_memory_is_said_before_anything_is_loaded(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_dir / "model.safetensors").write_bytes(b"")  # so that loading would fail in another way
    monkeypatch.setattr(memory, "available_bytes", lambda: 300 << 20)
    message = r"too little memory: .* the KV cache 1\.0 GiB .* 0\.3 GiB are available"
    assert_refused(model_dir, message, kv_cache_bytes=1 << 30)


def test_a_container_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("400\n")
    monkeypatch.setattr(memory, "CGROUP_LIMITS", ((tmp_path / "max", tmp_path / "current"),))
    assert memory.available_bytes() == 600
    (tmp_path / "max").write_text("max\n")
    available = memory.available_bytes()
    assert available is None or available > 1 << 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float8"}, "dtype float8 is not supported; choose auto, float32, bfloat16, float16"),
        ({"kv_cache_dtype": "int4"}, "KV cache dtype int4 is not supported; choose auto, float32, bfloat16, float16"),
        (
            {"kv_cache_dtype": "fp8"},
            "KV cache dtype fp8 is for the kernels of a GPU; on the CPU choose auto, float32, bfloat16",
        ),
        ({"quantization": "fp4"}, "quantization fp4 is not supported; choose none, int8"),
        ({"quantization": "int8", "dtype": "float32"}, "quantization int8 and dtype float32 exclude each other"),
        ({"load_format": "pickle"}, "load format pickle is not supported"),
        ({"block_size": 24}, "block size 24 is not supported"),
        ({"max_model_len": 1000}, "max model length 1000 is beyond the model's context of 256 tokens"),
        ({"max_model_len": 256, "kv_cache_bytes": 200_000}, "holds only 128 tokens .* max model length 256"),
        ({"kv_cache_bytes": 100}, "holds only 0 tokens"),
    ],
)
def test_settings_that_cannot_be_met(model_dir: Path, options: dict[str, object], message: str) -> None:
    assert_refused(model_dir, message, **options)


def test_defaults_are_resolved(model_dir: Path) -> None:
    loaded = load_model(EngineConfig(model=str(model_dir), kv_cache_bytes=200_000))
    assert (loaded.settings.num_kv_blocks, loaded.settings.max_model_len) == (8, 128)  # what fits
    assert loaded.settings.max_num_seqs == 32
    assert loaded.settings.max_num_batched_tokens in (64, 128, 256)  # by measurement
    assert (loaded.dtype, loaded.device, loaded.model_name) == ("float32", "cpu", str(model_dir))
    assert loaded.runner.pipeline_depth == 1


def test_weights_and_cache_keep_the_precision_of_the_checkpoint(model_dir: Path) -> None:
    """bfloat16 weights are held as they are; asked to, an engine holds them, or its cache alone, in another form."""
    edit(model_dir, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))

    def blocks(**options: str) -> int:
        return load_model(
            EngineConfig(model=str(model_dir), kv_cache_bytes=40 * 24_576, **options)
        ).settings.num_kv_blocks  # type: ignore[arg-type]

    assert (
        blocks() == blocks(kv_cache_dtype="bfloat16") == 2 * blocks(kv_cache_dtype="float32") == blocks(dtype="float16")
    )
    assert load_model(EngineConfig(model=str(model_dir), kv_cache_bytes=1 << 20)).dtype == "bfloat16"
    load(model_dir, quantization="int8")
