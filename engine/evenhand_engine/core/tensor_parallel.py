"""Tensor parallelism over the devices of one machine: a process for each part of the model, all computing the same batches.

    core (rank 0)   scheduler ─▶ batch ─┬▶ its own runner ─▶ tokens
    workers                             └▶ their runners        all parts add up in each layer, by torch.distributed

Every part has all logits and the same seeds, so all sample the same tokens and keep the same seats: nothing but batches goes
to the workers, and nothing comes back. The core is a daemonic process, which may have no children of multiprocessing's:
workers are ordinary ones, and end when the core's end of their pipe closes.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import LoadedModel, load_shard
from evenhand_engine.errors import StartupError
from evenhand_engine.model.sharding import Shard
from evenhand_engine.scheduler.batch import Batch, Runner
from evenhand_engine.scheduler.request import Sampled


@dataclass(frozen=True, slots=True)
class _Task:
    """What a worker is told first."""

    config: EngineConfig
    rank: int
    meeting_place: Path


class WorkerLost(Exception):
    """A worker has ended, and the model with it."""


@dataclass(frozen=True, slots=True)
class _Worker:
    process: "subprocess.Popen[bytes]"
    connection: Connection


class ParallelRunner:
    """Implements `Runner` on rank 0: its own part of each batch, after all workers have been told of theirs."""

    def __init__(self, runner: Runner, workers: list[_Worker]) -> None:
        self._runner, self._workers = runner, workers

    @property
    def pipeline_depth(self) -> int:
        return self._runner.pipeline_depth

    def submit(self, batch: Batch) -> None:
        """Raises WorkerLost, rather than wait for a sum that never comes."""
        for rank, worker in enumerate(self._workers, start=1):
            if worker.process.poll() is not None:
                raise WorkerLost(
                    f"the process of tensor parallel rank {rank} has ended with {worker.process.returncode}"
                )
            worker.connection.send(batch)
        self._runner.submit(batch)

    def collect(self) -> list[Sampled]:
        return self._runner.collect()

    def close(self) -> None:
        """End the workers and leave the group. The end of this process does so too."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.wait()
        dist.destroy_process_group()


def load_parallel(config: EngineConfig) -> LoadedModel:
    """The model in `config.tensor_parallel_size` parts, the first of them in this process. Raises StartupError."""
    with tempfile.TemporaryDirectory() as directory:
        workers = [_start(config, rank, Path(directory)) for rank in range(1, config.tensor_parallel_size)]
        try:
            model = load_shard(config, _join(config, 0, Path(directory)))
        except BaseException:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
            raise
    return replace(model, runner=ParallelRunner(model.runner, workers), structures=None)  # grammars: told to one part


def _start(config: EngineConfig, rank: int, meeting_place: Path) -> _Worker:
    ours, theirs = Pipe(duplex=True)
    command = [sys.executable, "-m", "evenhand_engine.core.tensor_parallel", str(theirs.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()  # so that a worker's death closes the pipe
    ours.send(_Task(config, rank, meeting_place))
    return _Worker(process, ours)


def _join(config: EngineConfig, rank: int, meeting_place: Path) -> Shard:
    """Wait for the other parts. Raises StartupError if there are fewer GPUs than parts."""
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    size = config.tensor_parallel_size
    if on_gpu and torch.cuda.device_count() < size:
        raise StartupError(f"tensor parallel size {size} needs as many GPUs; {torch.cuda.device_count()} are visible")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
    meeting = f"file://{meeting_place / 'store'}"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=meeting, rank=rank, world_size=size)
    where = torch.device("cuda", rank) if on_gpu else torch.device("cpu")

    def add_up(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def least(number: int) -> int:
        numbers = torch.tensor([number], device=where)
        dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers.item())

    return Shard(rank, size, add_up, least)


def work(connection: Connection) -> None:
    """A worker's life: load its part, then compute every batch that it is told of."""
    task: _Task = connection.recv()
    runner = load_shard(task.config, _join(task.config, task.rank, task.meeting_place)).runner
    num_in_flight = 0
    with contextlib.suppress(EOFError):  # the core has ended
        while True:
            runner.submit(connection.recv())
            num_in_flight += 1
            if num_in_flight >= runner.pipeline_depth:
                runner.collect()
                num_in_flight -= 1
    dist.destroy_process_group()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group by a terminal; the core ends it
        signal.signal(number, signal.SIG_IGN)
    work(Connection(int(sys.argv[1])))
