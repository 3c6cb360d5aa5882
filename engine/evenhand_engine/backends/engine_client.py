"""EngineClient: the HTTP process's end of the pipe to the engine core process.

Owns the core process and the pipe. Two threads do the blocking reads and writes, so that a core that stands still never
blocks the event loop; everything else runs in the loop. What the loop is too late for waits, merged, in the `inbox`.
It knows nothing of requests, tenants or text.
"""

import asyncio
import contextlib
import multiprocessing
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

import msgspec

from evenhand_engine.backends.inbox import Inbox
from evenhand_engine.config import EngineConfig
from evenhand_engine.errors import StartupError
from evenhand_engine.messages import (
    EngineFailed,
    EngineReady,
    FromCore,
    Shutdown,
    StartupFailed,
    StartupProgress,
    StepOutputs,
    ToCore,
)
from evenhand_engine.model import progress
from evenhand_engine.signals import leave_to_the_first, withheld

Receive = Callable[[StepOutputs, float], None]
"""Take what one step brought, and the `time.monotonic()` at which it reached this process."""


class CoreProcess(Protocol):
    """What EngineClient needs of a `multiprocessing.Process`."""

    def join(self) -> None: ...
    def kill(self) -> None: ...


class Core(CoreProcess, Protocol):
    """An engine core that other processes can be connected to as well."""

    def connect(self) -> Connection:
        """One more pipe to it: this side's end."""
        ...


class SpawnedCore:
    """A core in a process of its own, which is passed the descriptors of more pipes by a socket."""

    def __init__(self, process: CoreProcess, doors: socket.socket) -> None:
        self._process = process
        self._doors = doors

    def join(self) -> None:
        self._process.join()
        self._doors.close()

    def kill(self) -> None:
        self._process.kill()

    def connect(self) -> Connection:
        ours, theirs = multiprocessing.Pipe(duplex=True)
        with theirs, contextlib.suppress(OSError):  # of a core that is gone: `ours` has ended then
            socket.send_fds(self._doors, [b"+"], [theirs.fileno()])
        return ours


class ConnectedCore:
    """For a process that only has a pipe to a core: it ends the pipe, not the core."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def join(self) -> None: ...

    def kill(self) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)


def _core_main(config: EngineConfig, connection: Connection, doors: socket.socket) -> None:
    leave_to_the_first()  # the HTTP process drains, and then the core ends with it
    from evenhand_engine.core.engine import run_core  # here, so that the HTTP process never imports torch

    run_core(config, connection, doors)
    os._exit(0)  # a thread that is in compiled code must not come back to an interpreter that ends: it would abort


def spawn_core(config: EngineConfig) -> tuple[Core, Connection]:
    """Start the engine core in a process of its own; returns it and this side's end of the first pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    our_doors, their_doors = socket.socketpair()
    args = (config, theirs, their_doors)
    process = context.Process(target=_core_main, args=args, name="evenhand-core", daemon=True)
    with withheld():
        process.start()
    theirs.close()  # so that the core's death is an end of file here
    their_doors.close()
    return SpawnedCore(process, our_doors), ours


class EngineClient:
    """Sends messages to the core, and hands on what its steps bring.

    Args:
        receive: called in the loop with the news of each step.
        lost: called in the loop, once, when the core is gone.

    Attributes:
        ready: what the core said when it was ready; None before.
        failure: why the core is gone; None while it lives.
        died: set when the core is gone.
    """

    def __init__(
        self, process: CoreProcess, connection: Connection, *, receive: Receive, lost: Callable[[], None]
    ) -> None:
        self.ready: EngineReady | None = None
        self.failure: str | None = None
        self.died = asyncio.Event()
        self._process = process
        self._connection = connection
        self._take_outputs = receive
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineReady] = self._loop.create_future()
        self._inbox = Inbox()
        self._outbox: queue.SimpleQueue[ToCore | None] = queue.SimpleQueue()
        self._closing = False
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    async def start(self) -> EngineReady:
        """Wait until the model is loaded; raises StartupError with the core's message if it cannot be."""
        return await asyncio.shield(self._started)

    def send(self, message: ToCore) -> None:
        """Messages arrive in the order in which they are sent; to a core that is gone, none does."""
        self._outbox.put(message)

    async def close(self, timeout: float = 5.0) -> None:
        """End the core: ask, then kill; returns when the process is gone.

        One that is still loading the model does not listen, and has nothing to lose.
        """
        if self._closing:
            return
        self._closing = True
        self._outbox.put(Shutdown())
        if self.ready is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self.died.wait()
        self._outbox.put(None)
        await self._loop.run_in_executor(None, self._end)

    def _end(self) -> None:
        self._process.kill()  # does nothing to a process that has ended
        self._process.join()
        for thread in self._threads:  # both ends of the pipe are dead, so neither can wait any longer
            thread.join()
        self._connection.close()

    def _write(self) -> None:
        """Thread: encode and send, until None."""
        encoder = msgspec.msgpack.Encoder()
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(encoder.encode(message))
            except OSError:
                return  # the core is gone: the reading thread sees the end of the file and says so

    def _read(self) -> None:
        """Thread: receive and decode, until the end of the file."""
        decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            try:
                while True:
                    message = decoder.decode(self._connection.recv_bytes())
                    if self._inbox.put(message, time.monotonic()):
                        self._loop.call_soon_threadsafe(self._receive)
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._lose, "the engine core process ended unexpectedly")
            except msgspec.MsgspecError as error:
                self._loop.call_soon_threadsafe(self._lose, f"the engine core sent an unreadable message: {error}")

    def _receive(self) -> None:
        for message, now in self._inbox.take():
            match message:
                case StepOutputs():
                    self._take_outputs(message, now)
                case StartupProgress():
                    progress.logger.info("%s", message.stage)
                case EngineReady():
                    self.ready = message
                    if not self._started.done():
                        self._started.set_result(message)
                case StartupFailed() | EngineFailed():
                    self._lose(message.message)

    def _lose(self, reason: str) -> None:
        if self.failure is not None:
            return
        self.failure = "the engine is shutting down" if self._closing else reason
        if not self._started.done():
            self._started.set_exception(StartupError(reason))
            self._started.exception()  # retrieved: nobody may be waiting
        self._lost()
        self.died.set()
