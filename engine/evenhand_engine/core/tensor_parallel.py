"""Tensor parallelism over the devices of one machine: a process for each part of the model, all computing the same batches.

    core (rank 0)   scheduler ─▶ batch ─┬▶ its own runner ─▶ masks ─┬▶ tokens
    workers                             └▶ their runners            └▶ tokens     all parts add up in each layer, by torch.distributed

Every part has all logits and the same seeds, so all sample the same tokens and keep the same seats: nothing but batches goes
to the workers, and behind each with outputs that follow a grammar or reason the masks of its rows; nothing comes back. Who
computes a step alone has lost the others' sums: whatever fails in one part is the end of all.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import LoadedModel, load_shard, resolve_shard
from evenhand_engine.core.workers import Lost, Workers, describe, receive
from evenhand_engine.errors import StartupError
from evenhand_engine.model.sharding import Made, Shard, Share
from evenhand_engine.scheduler.batch import Batch, Runner
from evenhand_engine.scheduler.request import Sampled

logger = logging.getLogger(__name__)


class PeerLost(Exception):
    """A sum failed in this part: another is gone."""


class ParallelRunner:
    """Implements `Runner` on rank 0: its own part of each batch, after all workers have been told of theirs.

    A step that fails ends this process: the workers are in the midst of it.
    """

    def __init__(self, runner: Runner, workers: Workers) -> None:
        self._runner, self._workers = runner, workers

    @property
    def pipeline_depth(self) -> int:
        return self._runner.pipeline_depth

    def submit(self, batch: Batch) -> None:
        try:
            self._workers.tell(batch)
            self._runner.submit(batch)
        except Exception as error:
            self._workers.fail(error)

    def collect(self) -> list[Sampled]:
        try:
            return self._runner.collect()
        except Exception as error:
            self._workers.fail(error)

    def close(self) -> None:
        """End the workers and leave the group. The end of this process does so too."""
        self._workers.close()
        dist.destroy_process_group()


def load_parallel(config: EngineConfig, lost: Lost) -> LoadedModel:
    """The model in `config.tensor_parallel_size` parts, the first of them in this process. Raises StartupError.

    `lost`: what to do when a part is gone, now or later.
    """
    size = config.tensor_parallel_size
    _, _, device = resolve_shard(
        config, Shard(0, size)
    )  # what stops all parts alike is said here, before there are any
    if device == "cuda" and torch.cuda.device_count() < size:
        raise StartupError(f"tensor parallel size {size} needs as many GPUs; {torch.cuda.device_count()} are visible")
    with tempfile.TemporaryDirectory() as directory:
        workers = Workers(config, __name__, Path(directory), lost)
        try:
            model = load_shard(config, _join(config, 0, Path(directory), _telling(workers)))
        except StartupError:
            workers.close()
            raise
        except Exception as error:
            workers.fail(error)
    return replace(model, runner=ParallelRunner(model.runner, workers))


def _telling(workers: Workers) -> Share:
    def share(make: Callable[[], Made]) -> Made:
        made = make()
        workers.tell(made)
        return made

    return share


def _join(config: EngineConfig, rank: int, meeting_place: Path, share: Share) -> Shard:
    """Wait for the other parts."""
    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    size = config.tensor_parallel_size
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
    meeting = f"file://{meeting_place / 'store'}"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=meeting, rank=rank, world_size=size)
    where = torch.device("cuda", rank) if on_gpu else torch.device("cpu")

    def add_up(tensor: Tensor) -> Tensor:
        _reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def least(number: int) -> int:
        numbers = torch.tensor([number], device=where)
        _reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers.item())

    return Shard(rank, size, add_up, least, share)


def _reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, operation)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerLost(str(error)) from error


def work(connection: Connection) -> None:
    """A worker's life: load its part, then compute every batch that it is told of."""
    task, told = receive(connection)

    def share(make: Callable[[], Made]) -> Made:
        made: Made = told.get()  # it follows the batch that is being computed
        return made

    try:
        runner = load_shard(task.config, _join(task.config, task.rank, task.meeting_place, share)).runner
        num_in_flight = 0
        while True:
            runner.submit(told.get())
            num_in_flight += 1
            if num_in_flight >= runner.pipeline_depth:
                runner.collect()
                num_in_flight -= 1
    except PeerLost:
        threading.Event().wait()  # for the core, which knows which one it was, and ends this one too
    except Exception as error:
        if not isinstance(error, StartupError | torch.OutOfMemoryError):
            logger.exception("rank %d of a tensor-parallel model failed", task.rank)
        with contextlib.suppress(OSError):
            connection.send(describe(error))
    os._exit(1)  # to leave a group whose other parts wait may take as long


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group by a terminal; the core ends it
        signal.signal(number, signal.SIG_IGN)
    work(Connection(int(sys.argv[1])))
