"""What the host does for one decode step of a GPU engine, with the scheduler: milliseconds by the number of requests.

The real scheduler, planner, layout, seats and sampling of `--device cuda`; launches and copies do nothing, as on a device that
is never late: what is left is the time in which a GPU would wait for its host. A step is what the engine's loop does for it:
plan and submit the next, take in the last, without a search for garbage in between. Shapes are those of an 8B model on an H200.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import common
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_runner import DeviceRunner
from evenhand_engine.core.structures import Structures
from evenhand_engine.model.cache import cache_dir
from evenhand_engine.model.decoder import Decoder
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_kernels.cpu.library import load_planner
from evenhand_kernels.cuda.kernels import CudaKernels
from evenhand_kernels.cuda.source import Variant
from evenhand_kernels.device import Event, Graph, Launch
from evenhand_kernels.kernels import AttentionLayer, KvCacheShape
from evenhand_policy.config import SchedulerConfig, TenantConfig

BATCH_SIZES = (1, 8, 32, 64, 128, 256)
VOCAB_SIZE = 64  # on a device the host only launches: let what stands for it here cost no more
PROMPT = 512
NUM_TENANTS = 8
PARTS = ("scheduler", "submit", "collect")


class IdleDevice:
    """Implements `Device`: does nothing, at once."""

    name = "idle"
    torch_device = torch.device("cpu")
    architecture = "sm_90"
    num_multiprocessors = 132

    def load(self, variant: Variant) -> Launch:
        return _launch

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield

    def record(self) -> Event:
        return _Past()

    def capture(self, work: Callable[[], None]) -> Graph:
        return _Nothing()

    def seconds(self, work: Callable[[], object], rounds: int) -> float:
        return 1.0

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30


def _launch(grid: int | tuple[int, ...], **arguments: Tensor | int | float | None) -> None:
    sampled = arguments.get("token_ids")
    if "top_k" in arguments and isinstance(sampled, Tensor):
        sampled.zero_()  # what lies there by chance may be no token


class _Past:
    def wait(self) -> None:
        pass

    def done(self) -> bool:
        return True


class _Nothing:
    def replay(self) -> None:
        pass


class IdleRunner(DeviceRunner):
    """The runner of an 8B model's decodes, without the model."""

    def __init__(self, settings: SchedulerSettings) -> None:
        kernels = CudaKernels(IdleDevice(), torch.bfloat16, planner=load_planner(cache_dir() / "kernels"))
        kernels.attention(AttentionLayer(32, 8, 128, 1e-5), KvCacheShape(1, settings.block_size, torch.bfloat16))

        def compute(input_ids: Tensor, plan: object, logits_indices: Tensor) -> Tensor:
            return torch.zeros(len(logits_indices), VOCAB_SIZE, dtype=torch.bfloat16)

        self.work = kernels.work
        super().__init__(Decoder(kernels, compute), kernels, settings, VOCAB_SIZE, Structures(VOCAB_SIZE))


def decode_steps(runner: IdleRunner, size: int, num_steps: int) -> dict[str, list[float]]:
    """Seconds of each part of `num_steps` steps of `size` requests."""
    tenants = tuple(TenantConfig(tenant_id=f"t{number}") for number in range(NUM_TENANTS))
    scheduler = Scheduler(runner.settings, SchedulerConfig(tenants=tenants))
    for number in range(size):
        params = SamplingParams(max_tokens=num_steps + 100, seed=number)
        prompt = [number % VOCAB_SIZE] * (PROMPT + number % 64)
        scheduler.add(Request(f"r{number}", f"t{number % NUM_TENANTS}", prompt, params, 0.0), 0.0)
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    in_flight, now = 0, 0.0
    while len(seconds["collect"]) < num_steps:
        now += 0.02
        marks = [time.perf_counter()]
        batch = scheduler.step(now)
        marks.append(time.perf_counter())
        assert batch is not None
        runner.submit(batch)
        in_flight += 1
        marks.append(time.perf_counter())
        if in_flight < runner.pipeline_depth:
            continue
        sampled = runner.collect()
        in_flight -= 1
        marks.append(time.perf_counter())
        scheduler.update(sampled, now + 0.01)
        marks.append(time.perf_counter())
        if batch.num_decodes == size:
            parts = [b - a for a, b in pairwise(marks)]
            seconds["scheduler"].append(parts[0] + parts[3])
            seconds["submit"].append(parts[1])
            seconds["collect"].append(parts[2])
    while in_flight:
        runner.collect()
        in_flight -= 1
    return seconds


class Attended(NamedTuple):
    """A step for the planner: int32 [num_requests], how long requests are, and how many tokens of each are computed."""

    seq_lens: NDArray[np.int32]
    num_rows: NDArray[np.int32]


def decodes(lens: Sequence[int] | NDArray[np.int_]) -> Attended:
    return Attended(np.array(lens, np.int32), np.ones(len(lens), np.int32))


def planning_us(runner: IdleRunner, steps: Iterable[Attended]) -> float:
    """Of the plan of a step's attention alone."""
    times = []
    for seq_lens, num_rows in steps:
        cu_seqlens_q = np.cumsum([0, *num_rows], dtype=np.int32)
        shape = runner.work.shape(len(seq_lens), int(cu_seqlens_q[-1]))
        words = torch.zeros(shape.words, dtype=torch.int32).numpy()
        started_at = time.perf_counter()
        runner.work.write(words, seq_lens, cu_seqlens_q, shape)
        times.append(time.perf_counter() - started_at)
    return 1e6 * statistics.median(times)


def growing(step: Attended, num_steps: int) -> Iterator[Attended]:
    return (step._replace(seq_lens=step.seq_lens + np.int32(number)) for number in range(num_steps))


def changing(step: Attended, num_steps: int) -> Iterator[Attended]:
    """Other lengths in each step, another number of requests, and other chunks: nothing of a plan is known from another."""
    rng = np.random.default_rng(1)
    for number in range(num_steps):
        kept = slice(number % 16, None)
        chunk = np.maximum(step.num_rows - number % 200, 1)
        longer = step.seq_lens * (1 + 0.2 * rng.random(len(chunk)))
        yield Attended(longer.astype(np.int32)[kept], chunk.astype(np.int32)[kept])


def attended() -> dict[str, Attended]:
    """Steps whose longest requests must be split, and one of 256 that need not be."""
    rng = np.random.default_rng(0)
    short = rng.integers(50, 1000, 255)
    beside_a_chunk = decodes([*rng.integers(100, 4000, 248), 9000])
    beside_a_chunk.num_rows[-1] = 1800
    return {
        "256 of 100 to 4,000": decodes(rng.integers(100, 4000, 256)),
        "28,000 beside 255 of 50 to 1,000": decodes([28_000, *short]),
        "8 of 20,000 beside 248 of 50 to 1,000": decodes([20_000] * 8 + list(short[:248])),
        "40 of 4,096": decodes([4096] * 40),
        "32 of 100 to 8,000": decodes(rng.integers(100, 8000, 32)),
        "a chunk of 1,800 at 9,000 beside 248 of 100 to 4,000": beside_a_chunk,
    }


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    num_steps = 30 if options.quick else 500
    settings = SchedulerSettings(max_num_seqs=256, max_num_batched_tokens=4096, num_kv_blocks=40_000)
    runner = IdleRunner(settings)
    runner.warm_up()
    gc.collect()
    gc.freeze()
    gc.disable()  # as the engine core does, see run_core: it looks for garbage in idle moments only
    rows, found, planning = [], {}, {}
    for size in BATCH_SIZES:
        seconds = decode_steps(runner, size, num_steps)
        total = [1e3 * sum(parts) for parts in zip(*seconds.values(), strict=True)]
        step = decodes(PROMPT + np.arange(size) % 64)
        found[size], planning[size] = statistics.median(total), planning_us(runner, growing(step, num_steps))
        middle = [f"{1e3 * statistics.median(seconds[name]):.3f}" for name in PARTS]
        rows.append([str(size), f"{found[size]:.3f}", *middle, f"{planning[size]:.0f}"])
    headings = ["requests", "step ms", *(f"{part} ms" for part in PARTS), "planning us"]
    common.print_table("The host's part of a decode step, launches stubbed", headings, rows)
    of_lengths = {name: planning_us(runner, growing(step, num_steps)) for name, step in attended().items()}
    changed = {name: planning_us(runner, changing(step, num_steps)) for name, step in attended().items()}
    rows = [[name, f"{us:.0f}", f"{changed[name]:.0f}"] for name, us in of_lengths.items()]
    common.print_table("The plan of a step's attention, microseconds", ["requests", "growing", "changing"], rows)
    figures = {"host_step_ms": found, "planning_us": planning, "planning_us_by_lengths": of_lengths}
    common.finish("host_step", figures | {"planning_us_of_changed_steps": changed})


if __name__ == "__main__":
    main()
