"""The GPU engine's runner on the emulated device: token for token what the CPU's gives, whatever is planned ahead.

Everything but the device is real: planner, launchers, buffers, graph keys, the overlap of two steps. The CPU engine computes in
float32, the kernels in float16: the models made here are so sure of their tokens that rounding moves none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_runner import DeviceRunner, graph_sizes
from evenhand_engine.core.model_runner import ModelRunner
from evenhand_engine.core.structures import Structures
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.decoder import Decoder, build_decoder
from evenhand_engine.model.precision import Precision
from evenhand_engine.model.weights import load_weights
from evenhand_engine.scheduler.batch import Runner
from evenhand_engine.scheduler.request import FinishReason, Request, SamplingParams, TokenLogprobs
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.device import Graph, Launch
from evenhand_kernels.emulation.device import EmulatedDevice
from evenhand_kernels.kernels import Kernels, KvCacheShape
from evenhand_kernels.reference import ReferenceKernels
from evenhand_policy.config import SchedulerConfig

from .conftest import make_checkpoint
from .test_packed_int import rewrite

SETTINGS = SchedulerSettings(
    max_num_seqs=5, max_num_batched_tokens=24, max_model_len=96, num_kv_blocks=24, growth_blocks=0.0
)
SIXTEEN_BITS = Precision(torch.float16)
NUM_OUTPUTS = 6
POISON = 190
"""A token whose embedding is not a number."""

PROMPTS = [
    [3 + (7 * number + 11 * place) % 150 for place in range(size)] for number, size in enumerate((1, 40, 16, 17, 33))
]


class CountingDevice(EmulatedDevice):
    """Counts what was replayed, and remembers what was loaded."""

    def __init__(self) -> None:
        super().__init__(cache_dir() / "kernels", checked=False)
        self.num_replays = 0
        self.loaded: set[str] = set()

    def load(self, variant: Variant) -> Launch:
        self.loaded.add(variant.kernel)
        return super().load(variant)

    def capture(self, work: Callable[[], None]) -> Graph:
        graph, device = super().capture(work), self

        class Counted:
            def replay(self) -> None:
                device.num_replays += 1
                graph.replay()

        return Counted()


@dataclass
class Model:
    """One random model, on the emulated device in float16 and on the CPU in float32."""

    device: CountingDevice
    on_device: Runner
    on_cpu: Runner
    structures: dict[Runner, Structures]

    @classmethod
    def make(cls, directory: Path, config_class: type[PreTrainedConfig], **fields: Any) -> Self:
        make_checkpoint(directory, config_class, **fields)
        return cls.load(directory)

    @classmethod
    def load(
        cls,
        directory: Path,
        precision: Precision = SIXTEEN_BITS,
        settings: SchedulerSettings = SETTINGS,
        kv_dtype: torch.dtype = torch.float16,
    ) -> Self:
        """`precision` of the weights on the device; on the CPU they are the same numbers, rounded to 16 bits."""
        config = load_model_config(directory)

        def decoder(kernels: Kernels, precision: Precision, dtype: torch.dtype) -> Decoder:
            weights = load_weights(directory, config, precision, kernels)
            cache = KvCacheShape(settings.num_kv_blocks, settings.block_size, dtype)
            return build_decoder(config, weights, kernels, cache, settings.max_model_len)

        device = CountingDevice()
        kernels = CudaKernels(device, torch.float16)
        of_device, of_cpu = Structures(config.vocab_size), Structures(config.vocab_size)
        on_device = DeviceRunner(decoder(kernels, precision, kv_dtype), kernels, settings, config.vocab_size, of_device)
        on_device.warm_up()
        with torch.inference_mode():
            reference = decoder(ReferenceKernels(), SIXTEEN_BITS, torch.float32)
            on_cpu = ModelRunner(reference, settings, of_cpu)
        return cls(device, on_device, on_cpu, {on_device: of_device, on_cpu: of_cpu})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory, reference = make_checkpoint(tmp_path_factory.mktemp("llama"), LlamaConfig)
    reference.get_input_embeddings().weight.data[POISON] = torch.nan
    reference.get_output_embeddings().weight.data[POISON] = 0  # so that it is never the best token
    reference.save_pretrained(directory)
    return Model.load(directory)


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    """What the CPU gives each prompt by itself."""
    return [served(model.on_cpu, SETTINGS, [prompt])[0] for prompt in PROMPTS]


class Engine:
    """Serves requests with a real scheduler, as many steps ahead as the runner wants."""

    def __init__(self, runner: Runner, settings: SchedulerSettings) -> None:
        self.scheduler = Scheduler(settings, SchedulerConfig())
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = {}
        self.runner = runner
        self._num_in_flight = 0
        self._now = 0.0

    def add(self, name: str, prompt: list[int], **params: Any) -> Request:
        sampling = SamplingParams(**({"max_tokens": NUM_OUTPUTS, "temperature": 0} | params))
        request = Request(name, "t", prompt, sampling, self._now)
        self.scheduler.add(request, self._now)
        return request

    def step(self) -> bool:
        """Whether there is anything left."""
        self._now += 1
        batch = self.scheduler.step(self._now)
        if batch is not None:
            self.runner.submit(batch)
            self._num_in_flight += 1
        if self._num_in_flight and (batch is None or self._num_in_flight >= self.runner.pipeline_depth):
            for output in self.scheduler.update(self.runner.collect(), self._now):
                if output.logprobs:
                    self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
                if output.prompt_logprobs:
                    self.prompt_logprobs[output.request_id] = output.prompt_logprobs
            self._num_in_flight -= 1
        return batch is not None or self._num_in_flight > 0

    def run(self) -> None:
        while self.step():
            pass


def outputs(request: Request) -> list[int]:
    return list(request.token_ids[request.num_prompt_tokens :])


def served(runner: Runner, settings: SchedulerSettings, prompts: Sequence[list[int]], **params: Any) -> list[list[int]]:
    engine = Engine(runner, settings)
    requests = [engine.add(f"r{number}", prompt, **params) for number, prompt in enumerate(prompts)]
    engine.run()
    assert all(request.finish_reason is FinishReason.LENGTH for request in requests)
    return [outputs(request) for request in requests]


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


@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"top_k": 9}, {"temperature": 1.3, "top_p": 0.9}])
def test_a_seed_gives_the_token_that_it_gives_on_the_cpu(model: Model, params: dict[str, Any]) -> None:
    """But where the number drawn falls between the borders of the two roundings, which is rare."""

    def drawn(runner: Runner) -> list[list[int]]:
        params_of = {"temperature": 1.0, "max_tokens": 1} | params
        return [output for seed in range(8) for output in served(runner, SETTINGS, PROMPTS, seed=seed, **params_of)]

    on_cpu, on_device = drawn(model.on_cpu), drawn(model.on_device)
    assert sum(ours == theirs for ours, theirs in zip(on_device, on_cpu, strict=True)) >= 37
    assert len({token for (token,) in on_cpu}) > 15, "draws that are no draws agree by themselves"


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.6, "frequency_penalty": 0.9, "presence_penalty": 2.0},
        {"allowed_token_ids": frozenset(range(20, 70))},
        {"logit_bias": ((9, 8.0), (150, 7.5), (70, -3.0))},
        {"min_p": 0.4, "temperature": 1.5, "seed": 3},
    ],
    ids=str,
)
def test_what_changes_the_logits_does_so_as_on_the_cpu(
    model: Model, alone: list[list[int]], params: dict[str, Any]
) -> None:
    """Beside requests whose logits stay as they are, and with preemptions, after which all is made anew."""
    settings = replace(SETTINGS, num_kv_blocks=6, enable_prefix_caching=False)
    found = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, settings)
        adjusted = [
            engine.add(f"a{number}", prompt, **({"max_tokens": 9} | params))
            for number, prompt in enumerate(PROMPTS[1:4])
        ]
        plain = engine.add("plain", PROMPTS[2])
        engine.run()
        assert outputs(plain) == alone[2]
        assert engine.scheduler.num_preemptions > 0
        found.append([outputs(request) for request in adjusted])
    assert found[0] == found[1]
    assert [tokens[:NUM_OUTPUTS] for tokens in found[1]] != alone[1:4], "nothing was changed"


def test_bad_words_do_not_come_though_the_host_knows_their_beginning_late(model: Model, alone: list[list[int]]) -> None:
    """Of one token, of two, of three, with a common end, and beside a bias of that end."""
    first, second, third, fourth, *_ = alone[1]
    words = ((alone[2][1],), (second, third), (first, second, fourth), (fourth, third), (7, third))
    found = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        requests = [
            engine.add(f"r{number}", prompt, bad_words_token_ids=words, logit_bias=((third, 0.25),), max_tokens=9)
            for number, prompt in enumerate(PROMPTS[:3])
        ]
        engine.run()
        found.append([outputs(request) for request in requests])
    assert found[0] == found[1]
    assert found[1][1][:2] == [first, second] and found[1][1][2] != third
    assert alone[2][1] not in found[1][2]


def test_no_stop_token_comes_before_min_tokens(model: Model, alone: list[list[int]]) -> None:
    params = {"stop_token_ids": frozenset(alone[1][:3]), "min_tokens": 4, "max_tokens": NUM_OUTPUTS}
    runs = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        request = engine.add("r", PROMPTS[1], **params)
        others = engine.add("s", PROMPTS[2])
        engine.run()
        assert outputs(others) == alone[2]
        runs.append(outputs(request))
    assert runs[0] == runs[1]
    assert not set(runs[1][:4]) & set(alone[1][:3])


def test_log_probabilities_are_those_of_the_cpu(model: Model) -> None:
    told = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        engine.add("quiet", PROMPTS[0])
        engine.add("asks", PROMPTS[1], num_logprobs=3)
        engine.add("asks for its own only", PROMPTS[2], num_logprobs=0)
        engine.run()
        told.append(engine.logprobs)
    on_cpu, on_device = told
    assert "quiet" not in on_device
    for name, expected in on_cpu.items():
        assert len(on_device[name]) == NUM_OUTPUTS
        for ours, theirs in zip(on_device[name], expected, strict=True):
            assert (ours.rank, ours.top_token_ids) == (theirs.rank, theirs.top_token_ids)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=0.05)
            assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=0.05)


@pytest.mark.parametrize("scales", [{}, {"k_scale": 1 / 8, "v_scale": 1 / 4}])
def test_an_fp8_cache_gives_nearly_the_same_distributions(tmp_path: Path, scales: dict[str, float]) -> None:
    """Numbers of three bits of mantissa move the tokens of a random model, but not far: a forgotten scale is off by several."""
    directory, _ = make_checkpoint(tmp_path, LlamaConfig, num_hidden_layers=1)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{name}": torch.tensor(scale) for name, scale in scales.items()}
    save_file(tensors, directory / "model.safetensors")
    model = Model.load(directory, kv_dtype=torch.float8_e4m3fn)
    told = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        for number, prompt in enumerate(PROMPTS):
            engine.add(f"r{number}", prompt, num_logprobs=20)
        engine.run()
        told.append(engine.logprobs)
    differences = []
    for name, (expected, *_) in told[0].items():  # later tokens follow others
        ours = dict(zip(told[1][name][0].top_token_ids, told[1][name][0].top_logprobs, strict=True))
        likely = list(zip(expected.top_token_ids, expected.top_logprobs, strict=True))[:3]
        differences += [abs(ours[token] - logprob) for token, logprob in likely]
    assert sum(differences) / len(differences) < 0.3


def test_logits_that_are_not_finite_end_their_request_alone(model: Model, alone: list[list[int]]) -> None:
    engine = Engine(model.on_device, SETTINGS)
    poisoned, good = engine.add("poisoned", [5, POISON, 7]), engine.add("good", PROMPTS[1])
    engine.run()
    assert poisoned.finish_reason is FinishReason.ERROR and not outputs(poisoned)
    assert outputs(good) == alone[1]


def test_a_step_without_memory_ends_its_requests_alone(
    model: Model, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often: nothing of it stays."""

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Engine(model.on_device, SETTINGS)
    for number in range(5):
        request = engine.add(f"large{number}", PROMPTS[1])
        with monkeypatch.context() as patch:
            patch.setattr(DeviceRunner, "_forward", exhausted)
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
