"""Workers: the processes of the ranks 1 and on of a tensor-parallel model, and what their end means.

    core (rank 0)   batches, masks ─▶ pipe ─▶ a thread of the worker ─▶ its runner
                    watch   ◀─ pipe ◀─ why it ends, or the end of the pipe

A sum that one part is missing from never comes, and torch would notice after minutes. So a thread waits for the end of any
worker, whatever all others do, and ends this process with it; and a worker whose core is gone ends at once, also in a sum.
The core is a daemonic process, which may have no children of multiprocessing's: workers are ordinary ones.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from pickle import HIGHEST_PROTOCOL
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

from evenhand_engine.config import EngineConfig
from evenhand_engine.errors import StartupError

logger = logging.getLogger(__name__)

Lost = Callable[[str], NoReturn]
"""Say why nothing can be computed any more, and end this process. Called by any thread."""

_EXPLAIN_SECONDS = 1.0  # for a worker's end to explain why a step failed here


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is told first."""

    config: EngineConfig
    rank: int
    meeting_place: Path


class _Worker(NamedTuple):
    rank: int
    process: "subprocess.Popen[bytes]"
    connection: Connection


class Workers:
    """Starts them, tells them what the first part does, and ends this process when one of them ends by itself."""

    def __init__(self, config: EngineConfig, module: str, meeting_place: Path, lost: Lost) -> None:
        """`module`: runs a worker, given the descriptor of its end of the pipe."""
        self._workers = [
            _start(Task(config, rank, meeting_place), module) for rank in range(1, config.tensor_parallel_size)
        ]
        self._lost = lost
        self._is_ending = False
        self._telling = threading.Lock()
        self._watch = threading.Thread(target=self._wait_for_an_end, name="workers", daemon=True)
        self._watch.start()

    def tell(self, message: object) -> None:
        """A batch, or what they need to compute the last one. Raises BrokenPipeError or ConnectionResetError where one is gone."""
        pickled = ForkingPickler.dumps(message, HIGHEST_PROTOCOL)  # once: masks of many rows have megabytes
        for worker in self._workers:
            worker.connection.send_bytes(pickled)

    def fail(self, error: Exception) -> NoReturn:
        """Something failed in this process, which the workers wait for in vain; or since one of them is gone."""
        if wait([worker.connection for worker in self._workers], _EXPLAIN_SECONDS):
            self._watch.join()  # who watches says so
        self._end(f"step failed on rank 0 of {len(self._workers) + 1}, and all wait for it: {describe(error)}")

    def close(self) -> None:
        """End them all, whatever they do."""
        self._is_ending = True
        for worker in self._workers:
            worker.process.kill()
        self._watch.join()
        for worker in self._workers:
            worker.process.wait()
            worker.connection.close()

    def _wait_for_an_end(self) -> None:
        """Thread. A worker says nothing before its end."""
        connections = {worker.connection: worker for worker in self._workers}
        worker = connections[wait(list(connections))[0]]  # type: ignore[index]
        if self._is_ending:
            return
        try:
            reason = str(worker.connection.recv())
        except (EOFError, OSError):
            reason = _how_it_ended(worker.process.wait())
        self._end(f"rank {worker.rank} of {len(self._workers) + 1} is gone: {reason}")

    def _end(self, why: str) -> NoReturn:
        with self._telling:  # the first reason is told, and no other
            for worker in self._workers:
                worker.process.kill()
            self._lost(f"tensor parallel {why}")


def receive(connection: Connection) -> "tuple[Task, SimpleQueue[Any]]":
    """In a worker: its task, and what it will be told. From now on it ends when the core does, whatever it does then."""
    task: Task = connection.recv()
    told: SimpleQueue[Any] = SimpleQueue()

    def pump() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                told.put(connection.recv())
        os._exit(0)

    threading.Thread(target=pump, name="told", daemon=True).start()
    return task, told


def describe(error: Exception) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, StartupError) else f"{type(error).__name__}: {text}"


def end_process(message: str) -> NoReturn:
    """A `Lost` for who has nobody to tell but the log."""
    logger.critical("%s", message)
    os._exit(1)


def _start(task: Task, module: str) -> _Worker:
    ours, theirs = Pipe(duplex=True)
    command = [sys.executable, "-m", module, str(theirs.fileno())]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    theirs.close()  # so that a worker's end is the end of the pipe
    ours.send(task)
    return _Worker(task.rank, process, ours)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    killed = f"killed by {signal.Signals(-code).name}"
    return f"{killed}, as a system does whose memory is full" if -code == signal.SIGKILL else killed
