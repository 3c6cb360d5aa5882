"""A model is loaded onto the device that the settings name, or the start says in one line what is in the way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import LlamaConfig

from evenhand_engine.commands.serve import serve
from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import load_model, load_shard
from evenhand_engine.core.model_runner import ModelRunner
from evenhand_engine.errors import StartupError
from evenhand_engine.model.progress import listening
from evenhand_engine.model.sharding import Shard
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_kernels.cpu.library import CompileError as NoCompilerError
from evenhand_kernels.cuda.quantized import QuantizedLinears
from evenhand_kernels.device import CompileError
from evenhand_kernels.emulation.device import EmulatedDevice
from evenhand_kernels.kernels import Linear
from evenhand_kernels.quantized import QuantizedTensor
from evenhand_policy.config import SchedulerConfig

from .conftest import make_checkpoint

BLOCK_BYTES = 2 * 3 * 2 * 32 * 16 * 2  # keys and values of 3 layers with 2 heads of 32, 16 tokens, 2 bytes each


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    directory, _ = make_checkpoint(tmp_path_factory.mktemp("llama"), LlamaConfig)
    return EngineConfig(
        model=str(directory),
        device="emulated",
        max_num_seqs=2,
        max_num_batched_tokens=16,
        kv_cache_bytes=20 * BLOCK_BYTES,
    )


@pytest.mark.parametrize("device", ["emulated", "cpu"])
def test_a_start_says_what_it_does(config: EngineConfig, device: str) -> None:
    said: list[str] = []
    with listening(said.append):
        load_model(replace(config, device=device))
    stages = [stage for stage in said if "%" not in stage]  # which comes of one that takes long
    assert stages == ["preparing the kernels", "loading the weights", "warming up"]


def test_the_cache_is_as_large_as_asked_for(config: EngineConfig) -> None:
    model = load_model(config)
    assert (model.device, model.dtype, model.settings.num_kv_blocks) == ("emulated", "bfloat16", 20)
    assert model.runner.pipeline_depth == 2


@pytest.mark.parametrize(
    "fields, shard, message",
    [
        ({"intermediate_size": 140}, Shard(), r"intermediate_size 140 is not supported on a GPU: .* multiple of 8"),
        ({"hidden_size": 102}, Shard(), "hidden_size 102 is not supported on a GPU"),
        (
            {},
            Shard(0, 2),
            r"intermediate_size 68 on each of 2 GPUs is not supported on a GPU: .*--tensor-parallel-size",
        ),
    ],
)
def test_sizes_that_kernels_cannot_read_are_refused(
    config: EngineConfig, tmp_path: Path, fields: dict[str, int], shard: Shard, message: str
) -> None:
    """A kernel would leave what is beyond the last 16 bytes as it was."""
    directory, _ = make_checkpoint(tmp_path, LlamaConfig, num_hidden_layers=1, **fields)
    with pytest.raises(StartupError, match=message):
        load_shard(replace(config, model=str(directory)), shard)


def test_an_fp8_cache_holds_twice_as_much(config: EngineConfig) -> None:
    assert load_model(replace(config, kv_cache_dtype="fp8")).settings.num_kv_blocks == 40


def test_weights_are_quantised_where_asked(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    linear = QuantizedLinears.linear

    def noting(self: QuantizedLinears, weight: QuantizedTensor, bias: Tensor | None) -> Linear:
        seen.add(weight.bits)
        return linear(self, weight, bias)

    monkeypatch.setattr(QuantizedLinears, "linear", noting)
    assert load_model(replace(config, quantization="int8")).dtype == "bfloat16"
    assert seen == {8}


def test_the_cache_gets_what_weights_and_activations_leave(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 100 * BLOCK_BYTES
    monkeypatch.setattr(EmulatedDevice, "memory", lambda self: (60 * BLOCK_BYTES, total))
    monkeypatch.setattr("evenhand_engine.core.device_loading.weight_bytes", lambda *_: 0)
    assert load_model(replace(config, kv_cache_bytes=None, gpu_memory_utilization=0.8)).settings.num_kv_blocks == 40
    with pytest.raises(StartupError, match=r"no memory is left on emulated .* --gpu-memory-utilization 0\.3 keeps"):
        load_model(replace(config, kv_cache_bytes=None, gpu_memory_utilization=0.3))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmulatedDevice, "memory", lambda self: (10_000, 10 << 30))
    with pytest.raises(
        StartupError, match=r"the weights need 0\.0 GiB, 0\.0 GiB of 10\.0 GiB are free: .*--tensor-parallel-size"
    ):
        load_model(config)


def test_memory_that_runs_out_on_the_way_is_said_with_what_helps(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate 2.00 GiB")

    monkeypatch.setattr("evenhand_engine.core.device_runner.DeviceRunner.warm_up", exhausted)
    with pytest.raises(StartupError, match=r"tried to allocate 2\.00 GiB; lower --gpu-memory-utilization"):
        load_model(config)


def test_a_kernel_that_does_not_compile_is_named_with_its_line(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> None:
        raise CompileError('rms_norm: rms_norm.cu(6): error: identifier "x" is undefined')

    monkeypatch.setattr(EmulatedDevice, "load", wrong)
    with pytest.raises(StartupError, match=r"^rms_norm: rms_norm\.cu\(6\): error: identifier"):
        load_model(config)


def test_without_a_compiler_steps_are_planned_in_numpy(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(cache_dir: Path) -> None:
        raise NoCompilerError("no g++ here")

    monkeypatch.setattr("evenhand_engine.core.device_loading.load_planner", no_compiler)
    load_model(config)  # whose warm-up plans the largest step
    assert [record.getMessage() for record in caplog.records if "planned" in record.msg] == [
        "steps are planned in Python, which takes some 0.1 ms longer for each: no g++ here"
    ]


def test_the_emulated_device_is_for_tests_and_not_in_the_help() -> None:
    shown = CliRunner().invoke(serve, ["--help"]).output
    assert "[auto|cpu|cuda]" in shown and "emulated" not in shown


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float32"}, "dtype float32 is not supported on a GPU; choose auto, bfloat16 or float16"),
        ({"quantization": "int8", "dtype": "float16"}, "quantization int8 and dtype float16 exclude each other"),
        ({"device": "tpu"}, "device tpu is not supported; choose auto, cpu or cuda"),
        (
            {"dtype": "float16", "kv_cache_dtype": "bfloat16"},
            "KV cache dtype bfloat16 is not supported on a GPU that computes in float16; choose auto or fp8",
        ),
        ({"kv_cache_dtype": "float16"}, "KV cache dtype float16 is not supported on a GPU that computes in bfloat16"),
        (
            {"kernels": "reference", "kv_cache_dtype": "fp8"},
            "KV cache dtype fp8 is for the kernels of a GPU",
        ),
        ({"activation_dtype": "bfloat16"}, "activation dtype bfloat16 is for the CPU's own kernels: leave it out"),
        ({"device": "cpu", "kernels": "reference", "activation_dtype": "bfloat16"}, "is for the CPU's own kernels"),
    ],
)
def test_what_a_device_cannot_do_is_refused(config: EngineConfig, changed: dict[str, str], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load_model(replace(config, **changed))


def test_heads_that_an_fp8_cache_cannot_hold_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LlamaConfig, head_dim=48)
    with pytest.raises(
        StartupError, match="KV cache dtype fp8 needs heads of a multiple of 32, and this model's have 48"
    ):
        load_model(EngineConfig(model=str(tmp_path), device="emulated", kv_cache_dtype="fp8"))


def test_the_reference_takes_the_place_of_the_devices_kernels(config: EngineConfig) -> None:
    """Greedy tokens are those of the CPU's kernels: both compute in float32."""
    reference = load_model(replace(config, kernels="reference"))
    assert isinstance(reference.runner, ModelRunner) and reference.device == "emulated"
    found = []
    for model in (reference, load_model(replace(config, device="cpu"))):
        scheduler = Scheduler(model.settings, SchedulerConfig())
        request = Request("r", "t", [3, 14, 15, 92, 65], SamplingParams(max_tokens=8, temperature=0), 0.0)
        scheduler.add(request, 0.0)
        while (batch := scheduler.step(0.0)) is not None:
            model.runner.submit(batch)
            scheduler.update(model.runner.collect(), 0.0)
        found.append(list(request.token_ids))
    assert found[0] == found[1]
    with pytest.raises(StartupError, match="kernels fast are not supported; choose auto or reference"):
        load_model(replace(config, kernels="fast"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(config: EngineConfig) -> None:
    with pytest.raises(StartupError, match="torch finds no CUDA device"):
        load_model(replace(config, device="cuda", kernels="reference"))
    with pytest.raises(StartupError, match=r"CuPy cannot be imported|torch finds no CUDA device"):
        load_model(replace(config, device="cuda"))
