"""The device's runner on the emulated device, and the CPU's runner that it is held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import LlamaConfig, PreTrainedConfig

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_runner import DeviceRunner
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
from evenhand_kernels.cpu.library import load_planner
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.device import Graph, Launch
from evenhand_kernels.emulation.device import EmulatedDevice
from evenhand_kernels.kernels import Kernels, KvCacheShape
from evenhand_kernels.reference import ReferenceKernels
from evenhand_policy.config import SchedulerConfig

from .conftest import make_checkpoint

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
        device: CountingDevice | None = None,
    ) -> Self:
        """`precision` of the weights on the device; on the CPU they are the same numbers, rounded to 16 bits."""
        config = load_model_config(directory)

        def decoder(kernels: Kernels, precision: Precision, dtype: torch.dtype) -> Decoder:
            weights = load_weights(directory, config, precision, kernels)
            cache = KvCacheShape(settings.num_kv_blocks, settings.block_size, dtype)
            return build_decoder(config, weights, kernels, cache, settings.max_model_len)

        device = device or CountingDevice()
        kernels = CudaKernels(device, torch.float16, planner=load_planner(cache_dir() / "kernels"))
        of_device, of_cpu = Structures(config.vocab_size), Structures(config.vocab_size)
        on_device = DeviceRunner(decoder(kernels, precision, kv_dtype), kernels, settings, config.vocab_size, of_device)
        on_device.warm_up()
        with torch.inference_mode():
            reference = decoder(ReferenceKernels(), SIXTEEN_BITS, torch.float32)
            on_cpu = ModelRunner(reference, settings, of_cpu)
        return cls(device, on_device, on_cpu, {on_device: of_device, on_cpu: of_cpu})


def make_model(folder: Path) -> Model:
    """A Llama whose token `POISON` makes what reads it no number."""
    directory, reference = make_checkpoint(folder, LlamaConfig)
    reference.get_input_embeddings().weight.data[POISON] = torch.nan
    reference.get_output_embeddings().weight.data[POISON] = 0  # so that it is never the best token
    reference.save_pretrained(directory)
    return Model.load(directory)


def served_alone(model: Model) -> list[list[int]]:
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
        is_due = self._num_in_flight > 0 and (batch is None or self._num_in_flight >= self.runner.pipeline_depth)
        if is_due:
            for output in self.scheduler.update(self.runner.collect(), self._now):
                if output.logprobs:
                    self.logprobs.setdefault(output.request_id, []).extend(output.logprobs)
                if output.prompt_logprobs:
                    self.prompt_logprobs[output.request_id] = output.prompt_logprobs
            self._num_in_flight -= 1
        return batch is not None or is_due

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
