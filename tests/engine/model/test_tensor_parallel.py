"""A model in two parts, each in a process of its own, gives the tokens that it gives in one."""

import multiprocessing
import os
import select
import signal
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import msgspec
import pytest
import torch
from transformers import LlamaConfig

from evenhand_engine.backends.engine_client import spawn_core
from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import LoadedModel, load_model
from evenhand_engine.core.tensor_parallel import ParallelRunner
from evenhand_engine.core.workers import Workers, _how_it_ended, describe
from evenhand_engine.errors import StartupError
from evenhand_engine.messages import AddRequest, EngineFailed, EngineReady, FromCore, StartupFailed, StepOutputs
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.sharding import Shard, ShardedSource, sharded_config
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_kernels.quantized import QuantizedTensor
from evenhand_policy.config import SchedulerConfig
from harness.tensors import k_quant, quantized

from .conftest import make_checkpoint

SECONDS = 120.0  # that anything may take on a busy machine
PROMPTS = ([3, 14, 15, 92, 65, 35], [8, 97], list(range(20, 60)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """With biases everywhere: one behind inputs that are dealt out must be added once."""
    directory, _ = make_checkpoint(
        tmp_path_factory.mktemp("llama"), LlamaConfig, attention_bias=True, mlp_bias=True, intermediate_size=160
    )
    return EngineConfig(
        model=str(directory),
        device="emulated",
        dtype="float16",
        max_num_seqs=3,
        max_num_batched_tokens=24,
        kv_cache_bytes=1 << 20,
    )


@contextmanager
def loaded(config: EngineConfig) -> Iterator[LoadedModel]:
    model = load_model(config)
    try:
        yield model
    finally:
        if isinstance(model.runner, ParallelRunner):
            model.runner.close()


def served(model: LoadedModel, **params: Any) -> list[list[int]]:
    scheduler = Scheduler(model.settings, SchedulerConfig())
    requests = [
        Request(f"r{number}", "t", prompt, SamplingParams(**{"max_tokens": 6, "temperature": 0} | params), 0.0)
        for number, prompt in enumerate(PROMPTS)
    ]
    for request in requests:
        scheduler.add(request, 0.0)
    in_flight = 0
    while (batch := scheduler.step(0.0)) is not None or in_flight:
        if batch is not None:
            model.runner.submit(batch)
            in_flight += 1
        if batch is None or in_flight >= model.runner.pipeline_depth:
            scheduler.update(model.runner.collect(), 0.0)
            in_flight -= 1
    return [list(request.token_ids[request.num_prompt_tokens :]) for request in requests]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_two_parts_give_the_tokens_of_the_whole(config: EngineConfig, kernels: str) -> None:
    config = replace(config, kernels=kernels)
    with loaded(config) as whole:
        expected = served(whole)
    with loaded(replace(config, tensor_parallel_size=2)) as parts:
        assert isinstance(parts.runner, ParallelRunner)
        assert served(parts) == expected
        drawn = served(parts, temperature=1.0, seed=5)
        assert served(parts, temperature=1.0, seed=5) == drawn != expected, "the parts no longer sit alike"


class Core:
    """An engine core in a process of its own, with the process of rank 1, and what it says."""

    def __init__(self, config: EngineConfig) -> None:
        before = set(multiprocessing.active_children())
        self._core, self._connection = spawn_core(config)
        (self.process,) = set(multiprocessing.active_children()) - before
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._core.kill()
        self._core.join()
        self._connection.close()

    def expect(self, *kinds: type[Any]) -> Any:
        """The next message of one of these kinds."""
        while True:
            assert self._connection.poll(SECONDS), f"none of {kinds} came"
            message = self._decoder.decode(self._connection.recv_bytes())
            if isinstance(message, kinds):
                return message

    def stream(self) -> None:
        """Returns when a request has its first token of many."""
        params = SamplingParams(max_tokens=200, temperature=0)
        prompt = array("I", PROMPTS[0]).tobytes()
        request = AddRequest(
            request_id="r", tenant_id="t", prompt_token_ids=prompt, sampling_params=params, arrival_time=0.0
        )
        self._connection.send_bytes(msgspec.msgpack.encode(request))
        while not any(output.token_ids for output in self.expect(StepOutputs).outputs):
            pass

    @property
    def worker(self) -> int:
        """Process id."""
        pids = map(int, filter(str.isdigit, os.listdir("/proc")))
        return next(pid for pid in pids if _parent(pid) == self.process.pid and b"tensor_parallel" in _command(pid))

    def is_silent(self) -> bool:
        """Whether its pipe has ended."""
        with pytest.raises(EOFError):
            self.expect(EngineFailed)
        return True


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@contextmanager
def watched(pid: int) -> Iterator[Callable[[], bool]]:
    """Whether the process ends in time."""
    descriptor = os.pidfd_open(pid)
    try:
        yield lambda: bool(select.select([descriptor], [], [], SECONDS)[0])
    finally:
        os.close(descriptor)


def test_a_worker_that_is_killed_ends_the_engine_which_says_who_it_was(config: EngineConfig) -> None:
    with Core(replace(config, tensor_parallel_size=2)) as core:
        core.expect(EngineReady)
        core.stream()
        os.kill(core.worker, signal.SIGKILL)
        message = core.expect(EngineFailed).message
        assert (
            message == "tensor parallel rank 1 of 2 is gone: killed by SIGKILL, as a system does whose memory is full"
        )
        assert core.is_silent()
        core.process.join(SECONDS)
        assert core.process.exitcode == 1


def test_a_worker_does_not_outlive_its_core(config: EngineConfig) -> None:
    with Core(replace(config, tensor_parallel_size=2)) as core:
        core.expect(EngineReady)
        core.stream()
        with watched(core.worker) as has_ended:
            core.process.kill()
            assert has_ended()


def test_what_stops_a_part_from_loading_is_said(config: EngineConfig) -> None:
    """By the worker, who is told apart, or by the core, whichever comes first."""
    with Core(replace(config, tensor_parallel_size=2, kv_cache_bytes=1)) as core:
        message = core.expect(StartupFailed, EngineFailed).message
        assert "a KV cache of 0 MiB holds only 0 tokens of this model" in message
        core.process.join(SECONDS)
        assert not core.process.is_alive()


PART = """
import sys, time
from multiprocessing.connection import Connection

connection = Connection(int(sys.argv[1]))
if connection.recv().rank == {rank}:
    connection.send("no memory")
    sys.exit(1)
time.sleep(600)  # deaf, as in a sum that never comes
"""


@pytest.fixture
def make_workers(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], tuple[Workers, list[str]]]]:
    """Workers of three ranks, of which one says why it ends, and what they tell; a lost one ends a thread here."""
    made: list[Workers] = []

    def make(rank: int) -> tuple[Workers, list[str]]:
        told: list[str] = []

        def lose(message: str) -> NoReturn:
            told.append(message)
            raise SystemExit

        (tmp_path / "part.py").write_text(PART.format(rank=rank))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        made.append(Workers(replace(config, tensor_parallel_size=4), "part", tmp_path, lose))
        return made[-1], told

    yield make
    for workers in made:
        workers.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_ends_says_why_and_takes_all_others_along(
    make_workers: Callable[[int], tuple[Workers, list[str]]],
) -> None:
    workers, told = make_workers(2)
    workers._watch.join(SECONDS)
    assert told == ["tensor parallel rank 2 of 4 is gone: no memory"]
    assert [worker.process.wait(SECONDS) for worker in workers._workers if worker.rank != 2] == [-9, -9]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_step_that_fails_here_ends_all(make_workers: Callable[[int], tuple[Workers, list[str]]]) -> None:
    workers, told = make_workers(0)
    with pytest.raises(SystemExit):
        workers.fail(ValueError("no\nsum"))
    assert told[:1] == ["tensor parallel step failed on rank 0 of 4, and all wait for it: ValueError: no sum"]
    assert [worker.process.wait(SECONDS) for worker in workers._workers] == [-9] * 3


def test_an_end_is_described_in_one_line() -> None:
    assert [_how_it_ended(code) for code in (3, -6)] == ["exit code 3", "killed by SIGABRT"]
    assert describe(torch.OutOfMemoryError("CUDA out\nof memory")) == "OutOfMemoryError: CUDA out of memory"
    assert describe(StartupError("too large")) == "too large"


def test_what_cannot_be_dealt_out_is_refused(config: EngineConfig) -> None:
    model_config = load_model_config(Path(config.model or ""))
    with pytest.raises(StartupError, match="size 4 does not divide the model's num_heads 6"):
        sharded_config(model_config, Shard(0, 4))
    with pytest.raises(StartupError, match="tensor parallelism is for GPUs"):
        load_model(replace(config, device="cpu", dtype="auto", tensor_parallel_size=2))


def test_parts_of_a_quantised_weight_are_the_weight() -> None:
    whole = quantized(4, 64, 4, 32, torch.float16, True)

    class Source:
        def take(self, name: str, *shape: int) -> QuantizedTensor:
            assert shape == whole.shape
            return whole

    def parts(name: str, *shape: int) -> list[torch.Tensor]:
        taken = [ShardedSource(Source(), Shard(rank, 2)).take(name, *shape) for rank in range(2)]
        return [part.dequantized() for part in taken if isinstance(part, QuantizedTensor)]

    down_proj = "layers.0.mlp.down_proj.weight"
    assert torch.equal(torch.cat(parts("layers.0.self_attn.q_proj.weight", 2, 64)), whole.dequantized())
    assert torch.equal(torch.cat(parts(down_proj, 4, 32), dim=1), whole.dequantized())
    whole = quantized(4, 64, 4, 64, torch.float16, True)  # a group of both parts
    assert torch.equal(torch.cat(parts(down_proj, 4, 32), dim=1), whole.dequantized())
    for columns in (512, 1024):  # super-blocks of both parts, and of one
        whole = k_quant(4, columns, 6)
        assert torch.equal(torch.cat(parts("layers.0.self_attn.q_proj.weight", 2, columns)), whole.dequantized())
        assert torch.equal(torch.cat(parts(down_proj, 4, columns // 2), dim=1), whole.dequantized())
    whole = k_quant(4, 256, 5)
    assert torch.equal(torch.cat(parts(down_proj, 4, 128), dim=1), whole.dequantized())
    whole = quantized(4, 192, 4, 64, torch.float16, True)
    with pytest.raises(StartupError, match=r"down_proj\.weight: groups of 64 inputs cannot be dealt out to 2 devices"):
        parts(down_proj, 4, 96)
