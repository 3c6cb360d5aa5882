"""EngineClient: the HTTP process's end of the pipe to the engine core process.

Owns the core process, the pipe and one stream per request in flight. Two threads do the blocking reads and writes, so
that a core that stands still never blocks the event loop; everything else runs in the loop. It knows nothing of HTTP,
tenants or text.
"""

import asyncio
import contextlib
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

import msgspec

from evenhand_engine.config import EngineConfig
from evenhand_engine.errors import EngineDeadError, StartupError
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromCore,
    Reconfigure,
    Shutdown,
    StartupFailed,
    StepOutputs,
    ToCore,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_policy.config import SchedulerConfig


class Arrival(NamedTuple):
    """One output and the `time.monotonic()` at which it reached this process."""

    output: RequestOutput
    time: float


class CoreProcess(Protocol):
    """What EngineClient needs of a `multiprocessing.Process`."""

    def join(self) -> None: ...
    def kill(self) -> None: ...


def _core_main(config: EngineConfig, connection: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group by a terminal or systemd: the HTTP
        signal.signal(number, signal.SIG_IGN)  # process drains first, and the core ends with it
    from evenhand_engine.core.engine import run_core  # here, so that the HTTP process never imports torch

    run_core(config, connection)


def spawn_core(config: EngineConfig) -> tuple[CoreProcess, Connection]:
    """Start the engine core in a process of its own; returns it and this side's end of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    process = context.Process(target=_core_main, args=(config, theirs), name="evenhand-core", daemon=True)
    process.start()
    theirs.close()  # so that the core's death is an end of file here
    return process, ours


class EngineClient:
    """Sends requests to the core and hands each one's outputs to whoever generates.

    Attributes:
        ready: what the core said when it was ready; None before.
        stats: the latest state of the engine; None until the first step.
        failure: why the core is gone; None while it lives.
        died: set when the core is gone.
    """

    def __init__(self, process: CoreProcess, connection: Connection) -> None:
        self.ready: EngineReady | None = None
        self.stats: EngineStats | None = None
        self.failure: str | None = None
        self.died = asyncio.Event()
        self._process = process
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineReady] = self._loop.create_future()
        self._streams: dict[str, asyncio.Queue[Arrival | None]] = {}  # None: the core is gone
        self._outbox: queue.SimpleQueue[ToCore | None] = queue.SimpleQueue()
        self._step_id = -1
        self._progress_at = time.monotonic()
        self._closing = False
        self._stats_listeners: list[Callable[[EngineStats], None]] = []
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    async def start(self) -> EngineReady:
        """Wait until the model is loaded; raises StartupError with the core's message if it cannot be."""
        return await asyncio.shield(self._started)

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    def on_stats(self, listener: Callable[[EngineStats], None]) -> None:
        """Call `listener` with every EngineStats that arrives."""
        self._stats_listeners.append(listener)

    async def generate(self, request: AddRequest) -> AsyncGenerator[Arrival, None]:
        """Yield the request's outputs; the last one has a finish reason. Closing the iterator aborts the request.

        Raises EngineDeadError if the core is gone or dies on the way.
        """
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        if not self._streams:
            self._progress_at = time.monotonic()
        stream = self._streams[request.request_id] = asyncio.Queue()
        self._outbox.put(request)
        try:
            while (arrival := await stream.get()) is not None:
                if arrival.output.finish_reason is not None:
                    self._streams.pop(request.request_id, None)
                yield arrival
                if arrival.output.finish_reason is not None:
                    return
            raise EngineDeadError(self.failure or "the engine core is gone")
        finally:
            self.abort(request.request_id)

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.ABORT, num_output_tokens: int | None = None
    ) -> None:
        """End a request; nothing more of it is delivered. Does nothing if it has ended."""
        if self._streams.pop(request_id, None) is not None and self.failure is None:
            self._outbox.put(AbortRequest(request_id=request_id, reason=reason, num_output_tokens=num_output_tokens))

    def reconfigure(self, config: SchedulerConfig, num_replicas: int = 1) -> None:
        """Enforce `config` from the next step on; `num_replicas` engines share its limits."""
        self._outbox.put(Reconfigure(config=config, num_replicas=num_replicas))

    def seconds_without_progress(self, now: float) -> float:
        """How long the core has had work and done none of it, by outputs and step ids; 0 while it is idle."""
        return now - self._progress_at if self._streams else 0.0

    async def close(self, timeout: float = 5.0) -> None:
        """End the core: ask, then kill; returns when the process is gone. Every stream ends with EngineDeadError.

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
                    self._loop.call_soon_threadsafe(self._receive, message, time.monotonic())
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(self._lose, "the engine core process ended unexpectedly")
            except msgspec.MsgspecError as error:
                self._loop.call_soon_threadsafe(self._lose, f"the engine core sent an unreadable message: {error}")

    def _receive(self, message: FromCore, now: float) -> None:
        match message:
            case StepOutputs(outputs=outputs, stats=stats):
                if outputs:
                    self._progress_at = now
                for output in outputs:
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream.put_nowait(Arrival(output, now))
                if stats is not None:
                    self._take_stats(stats, now)
            case EngineReady():
                self.ready = message
                self._progress_at = now
                if not self._started.done():
                    self._started.set_result(message)
            case StartupFailed() | EngineFailed():
                self._lose(message.message)

    def _take_stats(self, stats: EngineStats, now: float) -> None:
        if stats.step_id != self._step_id:
            self._step_id = stats.step_id
            self._progress_at = now
        self.stats = stats
        for listener in self._stats_listeners:
            listener(stats)

    def _lose(self, reason: str) -> None:
        if self.failure is not None:
            return
        self.failure = "the engine is shutting down" if self._closing else reason
        if not self._started.done():
            self._started.set_exception(StartupError(reason))
            self._started.exception()  # retrieved: nobody may be waiting
        for stream in self._streams.values():
            stream.put_nowait(None)
        self.died.set()
