"""The runner of a GPU on the emulated device, token for token as the CPU engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from evenhand_engine.core.device_runner import DeviceRunner, graph_sizes
from evenhand_engine.core.device_sampling import StepSampler
from evenhand_engine.core.device_seats import DeviceSeats
from evenhand_engine.model.precision import Precision
from evenhand_engine.scheduler.request import FinishReason

from .conftest import make_checkpoint
from .device_engine import PROMPTS, SETTINGS, Engine, Model, make_model, outputs, served, served_alone
from .test_fp8_weights import rewrite as rewrite_fp8
from .test_packed_int import rewrite


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    return served_alone(model)


@pytest.mark.parametrize(
    ("config_class", "fields"),
    [
        (LlamaConfig, {"head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1}),
        (MistralConfig, {"sliding_window": 20}),
        (Qwen2Config, {}),
        (Qwen3Config, {}),
        (SmolLM3Config, {"pad_token_id": 0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_architecture_alone_and_in_mixed_batches(
    tmp_path: Path, config_class: type[PreTrainedConfig], fields: dict[str, Any]
) -> None:
    model = Model.make(tmp_path, config_class, **fields)
    expected = [served(model.on_cpu, SETTINGS, [prompt])[0] for prompt in PROMPTS]
    assert served(model.on_device, SETTINGS, PROMPTS) == expected
    assert served(model.on_device, SETTINGS, PROMPTS[1:2]) == expected[1:2]


@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("gptq", 8)])
def test_packed_weights_stay_packed(tmp_path: Path, method: str, bits: int) -> None:
    """Their products are those of the weights that the codes say."""
    _, reference = make_checkpoint(tmp_path, LlamaConfig, intermediate_size=192)
    rewrite(tmp_path, reference, method, bits, "gptq")
    model = Model.load(tmp_path, Precision())
    assert "quantized_linear" in model.device.loaded
    expected = [served(model.on_cpu, SETTINGS, [prompt])[0] for prompt in PROMPTS]
    assert served(model.on_device, SETTINGS, PROMPTS) == expected


@pytest.mark.parametrize("form", ["per block", "per tensor"])
def test_fp8_weights_stay_fp8(tmp_path: Path, form: str) -> None:
    """Their products are those of the weights that floats and scales say."""
    _, reference = make_checkpoint(tmp_path, LlamaConfig, intermediate_size=192)
    rewrite_fp8(tmp_path, reference, form)
    model = Model.load(tmp_path, Precision())
    assert "quantized_linear" in model.device.loaded
    expected = [served(model.on_cpu, SETTINGS, [prompt])[0] for prompt in PROMPTS]
    assert served(model.on_device, SETTINGS, PROMPTS) == expected


def test_decodes_are_replayed_and_padding_changes_nothing(model: Model, alone: list[list[int]]) -> None:
    """Three requests in the graph of four."""
    before = model.device.num_replays
    assert served(model.on_device, SETTINGS, PROMPTS[:3]) == alone[:3]
    assert model.device.num_replays > before


@pytest.mark.parametrize("max_num_batched_tokens", [7, 24])
def test_preempted_requests_go_on_with_what_was_in_flight(model: Model, max_num_batched_tokens: int) -> None:
    settings = replace(
        SETTINGS, num_kv_blocks=6, max_num_batched_tokens=max_num_batched_tokens, enable_prefix_caching=False
    )
    prompts = [prompt[:17] for prompt in PROMPTS[1:]]
    expected = [served(model.on_cpu, SETTINGS, [prompt], max_tokens=30)[0] for prompt in prompts]
    engine = Engine(model.on_device, settings)
    requests = [engine.add(f"r{number}", prompt, max_tokens=30) for number, prompt in enumerate(prompts)]
    engine.run()
    assert [outputs(request) for request in requests] == expected
    assert engine.scheduler.num_preemptions > 0


def test_known_prefixes_are_read_where_they_lie(model: Model, alone: list[list[int]]) -> None:
    engine = Engine(model.on_device, SETTINGS)
    for name in ("first", "again"):
        request = engine.add(name, PROMPTS[1])
        engine.run()
        assert outputs(request) == alone[1]
    assert request.num_cached_tokens == 32


def test_who_leaves_with_steps_in_flight_disturbs_nobody(model: Model, alone: list[list[int]]) -> None:
    engine = Engine(model.on_device, SETTINGS)
    requests = [engine.add(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    for _ in range(7):
        engine.step()
    gone = [request for request in requests if request.num_in_flight_tokens][:2]
    assert gone
    for request in gone:
        engine.scheduler.abort(request.request_id, FinishReason.ABORT)
    late = engine.add("late", PROMPTS[4])
    engine.run()
    assert outputs(late) == alone[4]
    for request, expected in zip(requests, alone, strict=True):
        assert outputs(request) == (expected[: request.num_output_tokens] if request in gone else expected)


@pytest.mark.parametrize("owner, name", [(DeviceSeats, "lay_out"), (DeviceRunner, "_forward"), (StepSampler, "sample")])
def test_a_step_without_memory_ends_its_requests_alone(
    model: Model, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, owner: type[Any], name: str
) -> None:
    """However often, and wherever: nothing of it stays."""

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Engine(model.on_device, SETTINGS)
    for number in range(5):
        request = engine.add(f"large{number}", PROMPTS[1])
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, exhausted)
            with pytest.raises(torch.OutOfMemoryError):
                engine.step()
        engine.scheduler.fail(0.0)
        assert request.finish_reason is FinishReason.ERROR
    good = engine.add("good", PROMPTS[1])
    engine.run()
    assert outputs(good) == alone[1]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 16, 17, 256, 1000])
def test_recorded_sizes_cover_all_batches_and_waste_little(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for number in range(1, max_num_seqs + 1):
        padded = next(size for size in sizes if size >= number)
        assert padded - number < max(8, number / 7, number if number < 8 else 0)
