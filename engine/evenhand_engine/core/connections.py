"""Connections: the core's ends of the pipes to the HTTP side, which may be several processes.

The first pipe is the owner's, whose end is the core's: it also brings configs, and gets what is said of the engine as a whole.
API servers come and go by the `doors`: each adds requests and gets their outputs, and nothing else. One that is gone, or does
not read, has its requests aborted; the others do not notice. Nor do they if it is the owner who stands still: what is said of the
engine then waits for him.
"""

import contextlib
import logging
import os
import queue
import select
import socket
import struct
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

import msgspec

from evenhand_engine.core.compile_queue import Compiled
from evenhand_engine.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    FromCore,
    Shutdown,
    StepOutputs,
    ToCore,
)
from evenhand_engine.scheduler.request import FinishReason, RequestOutput

logger = logging.getLogger(__name__)

_SENDING = threading.Lock()
_SEND_SECONDS = 5.0  # that a side may leave its pipe full, before the core, which waits, gives it up


class Connections:
    """What came in, as one queue of commands; and outputs, each sent to where its request came from.

    Args:
        owner: the first pipe.
        doors: a socket that brings the descriptors of API servers' pipes; None: there are none.
        greeting: what each connection is sent first; None: nothing.

    Attributes:
        commands: what came in, or why nothing more can be read. Filled by threads once `start` was called.
    """

    def __init__(self, owner: Connection, doors: socket.socket | None = None, greeting: FromCore | None = None) -> None:
        self.commands: queue.SimpleQueue[ToCore | Compiled | Exception] = queue.SimpleQueue()
        self._owner = owner
        self._doors = doors
        self._greeting = greeting
        self._origins: dict[str, _ApiServer] = {}  # of requests that did not come from the owner
        self._writable = select.poll()

    def start(self) -> None:
        """Greet the owner, and begin to receive."""
        self._writable.register(self._owner, select.POLLOUT)
        if self._greeting is not None:
            send(self._owner, self._greeting)
        threading.Thread(target=self._receive, name="receiver", daemon=True).start()
        if self._doors is not None:
            threading.Thread(target=self._accept, args=(self._doors,), name="doors", daemon=True).start()

    @property
    def owner_reads(self) -> bool:
        """Whether there is room for a message to the owner, as there is not for long if he stands still."""
        return bool(self._writable.poll(0))

    def publish(self, outputs: Sequence[RequestOutput], stats: EngineStats | None = None) -> None:
        """Raises BrokenPipeError or ConnectionResetError if the owner is gone, or serves nobody himself and does not read."""
        if self._origins:
            outputs = self._send_to_origins(outputs)
        if outputs or stats is not None:
            try:
                send(self._owner, StepOutputs(outputs=tuple(outputs), stats=stats))
            except BlockingIOError as error:
                raise BrokenPipeError("the owner does not read") from error

    def _send_to_origins(self, outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
        """Those that are the owner's own are returned."""
        owners: list[RequestOutput] = []
        parts: dict[_ApiServer, list[RequestOutput]] = {}
        for output in outputs:
            if (server := self._origins.get(output.request_id)) is None:
                owners.append(output)
                continue
            parts.setdefault(server, []).append(output)
            if output.finish_reason is not None:
                del self._origins[output.request_id]
                server.open.discard(output.request_id)
        for server, part in parts.items():
            server.send(StepOutputs(outputs=tuple(part)))
        return owners

    def _receive(self) -> None:
        """Thread: the owner's commands."""
        decoder = msgspec.msgpack.Decoder(ToCore)
        try:
            while not isinstance(message := decoder.decode(self._owner.recv_bytes()), Shutdown):
                self.commands.put(message)
            self.commands.put(message)
        except (EOFError, OSError):
            self.commands.put(Shutdown())
        except Exception as error:  # deaf, the core would live on: the loop must end and say why
            self.commands.put(error)

    def _accept(self, doors: socket.socket) -> None:
        """Thread: new API servers, until the owner is gone."""
        with doors, contextlib.suppress(OSError):
            while descriptors := socket.recv_fds(doors, 1, 1)[1]:
                _bound_sends(self._owner)  # who has no streams of his own then, for which he might take his time
                server = _ApiServer(Connection(descriptors[0]))
                if self._greeting is not None:
                    server.send(self._greeting)
                threading.Thread(target=self._receive_from, args=(server,), name="receiver", daemon=True).start()

    def _receive_from(self, server: "_ApiServer") -> None:
        """Thread: requests of one API server, until it is gone; then what it has open is aborted."""
        decoder = msgspec.msgpack.Decoder(AddRequest | AbortRequest | Shutdown)
        try:
            while not isinstance(message := decoder.decode(server.connection.recv_bytes()), Shutdown):
                if isinstance(message, AddRequest):
                    server.open.add(message.request_id)
                    self._origins[message.request_id] = server
                self.commands.put(message)
        except (EOFError, OSError):
            pass
        except msgspec.MsgspecError:
            logger.exception("an API server sent an unreadable message")
        server.hang_up()
        for request_id in tuple(server.open):
            self.commands.put(AbortRequest(request_id=request_id, reason=FinishReason.ABORT))


class _ApiServer:
    """The pipe to one API server. Compared by identity.

    Attributes:
        open: its requests that have not ended.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.open: set[str] = set()
        self._is_gone = False
        _bound_sends(connection)

    def send(self, message: FromCore) -> None:
        """To one that is gone, nothing is sent; one that does not read is given up."""
        if self._is_gone:
            return
        try:
            send(self.connection, message)
        except OSError:
            self.hang_up()

    def hang_up(self) -> None:
        """End the connection, also under the feet of the thread that reads."""
        self._is_gone = True
        with contextlib.suppress(OSError), _socket(self.connection) as end:
            end.shutdown(socket.SHUT_RDWR)


def _socket(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))


def _bound_sends(connection: Connection) -> None:
    """A send that has to wait longer raises BlockingIOError."""
    with _socket(connection) as end:
        timeval = struct.pack("ll", int(_SEND_SECONDS), int(_SEND_SECONDS % 1 * 1e6))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def send(connection: Connection, message: FromCore) -> None:
    """Any thread."""
    with _SENDING:
        connection.send_bytes(msgspec.msgpack.encode(message))
