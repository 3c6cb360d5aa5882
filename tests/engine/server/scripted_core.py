"""A scripted engine core: the other end of the pipes, in threads of the test's process."""

import contextlib
import os
import queue
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec

from evenhand_engine.config import EngineConfig
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineReady,
    EngineStats,
    FromCore,
    Reconfigure,
    Shutdown,
    StepOutputs,
    ToCore,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

WAIT_SECONDS = 120.0


class _ThreadProcess:
    """Stands for the core's process, while the core is threads of this one."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self.connect = connect

    def join(self) -> None: ...

    def kill(self) -> None: ...


def token_ids(request: AddRequest) -> list[int]:
    """Those of its prompt."""
    return array("I", request.prompt_token_ids).tolist()


def idle_stats(config_digest: str) -> EngineStats:
    """Of a core that has nothing to do."""
    return EngineStats(
        time=time.monotonic(),
        step_id=0,
        num_running=0,
        num_waiting=0,
        num_deferred=0,
        num_kv_blocks=64,
        num_free_kv_blocks=64,
        num_preemptions=0,
        num_prefix_queries=0,
        num_prefix_hits=0,
        num_drafts=0,
        num_draft_tokens=0,
        num_accepted_tokens=0,
        virtual_time=0.0,
        config_digest=config_digest,
        step_tokens=(),
        step_seconds=(),
        tenants=(),
    )


M = TypeVar("M", bound=ToCore)
Reply = Callable[[AddRequest], Iterable[RequestOutput]]


@dataclass
class ScriptedCore:
    """The other end of the pipes. Answers every request at once with `reply`, or leaves it to the test.

    Attributes:
        reply: the outputs of a request; None: the test sends them itself.
        received: what the HTTP side sent, in order.
        origins: which connection each request came by, as a number.
        tells_config: whether it says which config it enforces, as a core does after its next step.
    """

    reply: Reply | None = None
    received: "queue.Queue[ToCore]" = field(default_factory=queue.Queue)
    origins: dict[str, int] = field(default_factory=dict)
    max_model_len: int = 256
    tells_config: bool = False
    knows_grammars: bool = True
    scores_prompts: bool = True
    _connection: Connection | None = None  # the first, which is the owner's
    _others: list[Connection] = field(default_factory=list)  # of API servers
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _open: dict[str, Connection] = field(default_factory=dict)  # requests without an end, and where they came from

    def spawn(self, config: EngineConfig) -> tuple[_ThreadProcess, Connection]:
        theirs, self._connection = Pipe(duplex=True)
        self.start()
        threading.Thread(target=self._run, args=(self._connection,), name="scripted-core", daemon=True).start()
        return _ThreadProcess(self.connect), theirs

    def connect(self) -> Connection:
        """One more pipe, for an API server."""
        theirs, ours = Pipe(duplex=True)
        self._others.append(ours)
        ours.send_bytes(msgspec.msgpack.encode(self.ready()))
        threading.Thread(target=self._run, args=(ours,), name="scripted-core", daemon=True).start()
        return theirs

    def start(self) -> None:
        self.send(self.ready())

    def ready(self) -> EngineReady:
        return EngineReady(
            model_name="tiny",
            max_model_len=self.max_model_len,
            num_kv_blocks=64,
            block_size=16,
            dtype="float32",
            device="cpu",
            knows_grammars=self.knows_grammars,
            scores_prompts=self.scores_prompts,
        )

    def _run(self, connection: Connection) -> None:
        decoder = msgspec.msgpack.Decoder(ToCore)
        try:
            while True:
                message = decoder.decode(connection.recv_bytes())
                if isinstance(message, Shutdown) and connection is not self._connection:
                    return _hang_up(connection)
                if isinstance(message, AddRequest):
                    self._open[message.request_id] = connection
                    self.origins[message.request_id] = connection.fileno()
                self.received.put(message)
                if isinstance(message, Shutdown):
                    return self.die()
                if isinstance(message, Reconfigure) and self.tells_config:
                    self.send(StepOutputs(outputs=(), stats=idle_stats(message.config.digest())))
                if isinstance(message, AddRequest):
                    for output in self.reply(message) if self.reply is not None else ():
                        self.output(output)
                if isinstance(message, AbortRequest) and message.request_id in self._open:
                    self.output(self.ending(message))
        except (EOFError, OSError):
            if connection is self._connection:
                return self.die()
            for request_id, origin in list(self._open.items()):
                if origin is connection:
                    self.received.put(AbortRequest(request_id=request_id, reason=FinishReason.ABORT))  # as a core does
            return None

    def ending(self, abort: AbortRequest) -> RequestOutput:
        """The end of a request, which the core says also where it was told."""
        num_output_tokens = abort.num_output_tokens or 0
        return RequestOutput(
            request_id=abort.request_id, finish_reason=abort.reason, num_output_tokens=num_output_tokens
        )

    def send(self, message: FromCore) -> None:
        self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, data: bytes) -> None:
        assert self._connection is not None
        with self._sending:
            self._connection.send_bytes(data)

    def output(self, *outputs: RequestOutput) -> None:
        """One step's: each goes to where its request came from."""
        parts: dict[Connection | None, list[RequestOutput]] = {}
        for output in outputs:
            parts.setdefault(self._open.get(output.request_id, self._connection), []).append(output)
            if output.finish_reason is not None:
                self._open.pop(output.request_id, None)
        for connection, part in parts.items():
            assert connection is not None
            with self._sending, contextlib.suppress(OSError):  # one that is gone
                connection.send_bytes(msgspec.msgpack.encode(StepOutputs(outputs=tuple(part))))

    def expect(self, kind: type[M]) -> M:
        """The next message of this kind; fails if none comes."""
        while True:
            message = self.received.get(timeout=WAIT_SECONDS)
            if isinstance(message, kind):
                return message

    def die(self) -> None:
        """End the connections as the end of the process would."""
        assert self._connection is not None
        for connection in (self._connection, *self._others):
            _hang_up(connection)


def _hang_up(connection: Connection) -> None:
    """Also under the feet of the thread that reads."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
