"""What the parts of `make gpu` share: the device, timing on it, figures as they come, and an engine without HTTP.

Each part is a script of its own, so that one that hangs or dies takes no other's figures with it: a figure is printed as a
line of JSON as soon as it is known, and `gpu.py` gathers the lines. With `--device emulated` sizes are tiny; then only
that the script runs is known, and the figures mean nothing.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evenhand_engine.config import EngineConfig, SchedulerSettings
from evenhand_engine.core.loading import LoadedModel, load_model
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_kernels.cuda.device import CudaDevice
from evenhand_kernels.device import Device, DeviceError
from evenhand_kernels.emulation.device import EmulatedDevice
from evenhand_policy.config import SchedulerConfig

ROUNDS = 7

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 32_768,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 199,
        "tie_word_embeddings": True,
    },
}
"""Of Llama 3.2 1B and 3.1 8B, and one for rehearsals."""


@dataclass(frozen=True)
class Options:
    """What every part is started with."""

    device: str
    seed: int

    @property
    def is_tiny(self) -> bool:
        return self.device == "emulated"

    def make_device(self) -> Device:
        """Raises DeviceError where there is none."""
        return EmulatedDevice(cache_dir() / "kernels", checked=False) if self.is_tiny else CudaDevice()


def options(summary: str | None, **choices: Sequence[str]) -> argparse.Namespace:
    """The command line of a part. `choices`: its own options, of which the first value is the default."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    parsed = parser.parse_args()
    parsed.options = Options(parsed.device, parsed.seed)
    return parsed


def report(**figures: object) -> None:
    """Print figures that are known now."""
    print(json.dumps(figures), flush=True)


def seconds_of(device: Device, work: Callable[[], object], number: int) -> float:
    """Of one `work` on the device: the median of some rounds, each a recorded graph of `number` of them in a row.

    What `work` reads was made inside `device.stream()`.
    """

    def several() -> None:
        for _ in range(number):
            work()

    with device.stream(), torch.inference_mode():
        several()
        device.record().wait()
        graph = device.capture(several)
        times = []
        for _ in range(ROUNDS):
            started_at = time.perf_counter()
            graph.replay()
            device.record().wait()
            times.append(time.perf_counter() - started_at)
    return statistics.median(times) / number


def copy_rate(device: Device, size: int) -> float:
    """Bytes read and written in a second by a copy of `size` bytes within the device: the ceiling of what memory bounds."""
    source = torch.ones(size, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(device, lambda: target.copy_(source), 4)


@contextmanager
def model_dir(shape: str) -> Iterator[Path]:
    """A directory with the config of a shape, for random weights."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(LLAMA | SHAPES[shape]))
        yield Path(directory)


def load(options: Options, shape: str, **settings: Any) -> LoadedModel:
    """The shape with random weights on the device."""
    with model_dir(shape) as directory:
        return load_model(EngineConfig(model=str(directory), device=options.device, load_format="dummy", **settings))


@dataclass
class Timing:
    """One request as its client would see it, in seconds since the loop began."""

    sent_at: float
    tenant_id: str
    token_times: list[float] = field(default_factory=list)


class Loop:
    """The engine's loop in this thread: a scheduler, a runner two steps deep, and what was sampled when."""

    def __init__(
        self,
        model: LoadedModel,
        settings: SchedulerSettings,
        config: SchedulerConfig | None = None,
        token_budgets: Iterator[int] | None = None,
        seed: int = 0,
    ) -> None:
        """`settings`: the model's, or made of them. `token_budgets`: of the steps to come, without end (a replay)."""
        self.scheduler = Scheduler(settings, config or SchedulerConfig(), token_budgets=token_budgets)
        self.timings: dict[str, Timing] = {}
        self.num_tokens_of_steps: list[int] = []
        self._runner, self._random = model.runner, random.Random(seed)
        self._vocab_size = 190
        self._in_flight: list[Batch] = []
        self._started_at = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._started_at

    @property
    def num_requests(self) -> int:
        return len(self.scheduler.request_table.requests)

    def add(self, num_prompt_tokens: int, num_output_tokens: int, tenant_id: str = "default") -> Timing:
        now, name = self.now, f"r{len(self.timings)}"
        prompt = array("I", [self._random.randrange(2, self._vocab_size) for _ in range(num_prompt_tokens)])
        params = SamplingParams(max_tokens=num_output_tokens, temperature=0)
        self.scheduler.add(Request(name, tenant_id, prompt, params, now), now)
        self.timings[name] = Timing(now, tenant_id)
        return self.timings[name]

    def step(self) -> bool:
        """Submit a step, and take one in when two are in flight. False: there was nothing to do."""
        batch = self.scheduler.step(self.now)
        if batch is not None:
            self._runner.submit(batch)
            self._in_flight.append(batch)
        if self._in_flight and (batch is None or len(self._in_flight) >= self._runner.pipeline_depth):
            self.num_tokens_of_steps.append(self._in_flight.pop(0).num_tokens)
            sampled = self._runner.collect()
            now = self.now
            for output in self.scheduler.update(sampled, now):
                self.timings[output.request_id].token_times += [now] * len(output.token_ids)
            return True
        return batch is not None

    def drain(self) -> None:
        """Until every request has ended."""
        while self.num_requests or self._in_flight:
            self.step()

    def num_outputs(self, tenant_id: str = "default", since: float = 0.0) -> int:
        return sum(
            time >= since
            for timing in self.timings.values()
            if timing.tenant_id == tenant_id
            for time in timing.token_times
        )


def main() -> None:
    """Tell the device's name, or in one line what is in the way."""
    try:
        report(device=options(__doc__).options.make_device().name)
    except DeviceError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
