"""ApiServers: the processes that serve the public port, as their owner sees them: start, config, drain, loss, end.

    clients ──▶ API server ◀──pipe──▶ engine core                 clients ──▶ API server ◀──HTTP──▶ a sidecar's upstream
                    └──channel──▶ owner: quotas, bodies' memory, metrics          └──channel──▶ owner: the same, and the queue

One that dies is started anew, on the same listening socket, so that who connects meanwhile only waits. Too many deaths within a
minute are the end of the server.
"""

import asyncio
import logging
import multiprocessing
import socket
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.channel import Channel
from evenhand_engine.frontend.door_messages import Cut, Drain, Idle, Serving, StartFailed
from evenhand_engine.frontend.service import Service
from evenhand_engine.server.tasks import GRACE_SECONDS
from evenhand_engine.signals import withheld
from evenhand_policy.config import SchedulerConfig

log = logging.getLogger(__name__)

_RESTART_SECONDS = 1.0  # before one that died is started anew
_MAX_DEATHS = 5  # within so many seconds:
_DEATHS_SECONDS = 60.0


class Keeper(Protocol):
    """The owner's end of one channel: a `Doorkeeper`, or more than that."""

    @property
    def is_current(self) -> bool:
        """Whether the API server enforces the config that it was sent last."""
        ...

    def enforce(self, config: SchedulerConfig, *, is_configured: bool = True) -> None: ...

    def receive(self, message: Any) -> None: ...

    def close(self) -> int:
        """Give back all that the API server held; returns how many requests ended by that."""
        ...


class Start(Protocol):
    """Starts an API server as a process, given its end of the channel to the owner and the socket that it listens on."""

    def __call__(self, owner: socket.socket, listener: socket.socket) -> BaseProcess: ...


class ApiServers:
    """One process for each of the listening sockets.

    Args:
        start: starts one.
        kind: of the messages that they send.

    Attributes:
        failure: why they are given up; None while they are not.
        failed: set when they are.
    """

    def __init__(self, start: Start, kind: Any, listeners: Sequence[socket.socket]) -> None:
        self.failure: str | None = None
        self.failed = asyncio.Event()
        self._start = start
        self._kind = kind
        self._listeners = listeners
        self._deaths: deque[float] = deque()
        self._is_draining = False
        self._keepers: list[asyncio.Task[None]] = []
        self._servers = [self._spawn(listener) for listener in listeners]

    async def serve(self, service: Service, keep: Callable[[Channel[Any]], Keeper]) -> None:
        """Returns when all of them serve; `keep` makes the keeper of each. Raises StartupError if one cannot."""
        self._service, self._keep = service, keep
        service.api_side = self
        for server in self._servers:
            await server.open(service, keep)
        await asyncio.gather(*(server.serving for server in self._servers))
        self._keepers = [asyncio.create_task(self._watch(place)) for place in range(len(self._servers))]

    # -- frontend.service.ApiSide

    @property
    def problem(self) -> str | None:
        """Why the public port is served by nobody; None: it is."""
        return None if any(server.is_serving for server in self._servers) else "no API server is serving"

    @property
    def is_current(self) -> bool:
        return all(server.is_current for server in self._servers)

    def enforce(self, config: SchedulerConfig) -> None:
        for server in self._servers:
            server.enforce(config)

    # -- the end

    def drain(self) -> None:
        """Let each refuse what is new."""
        self._is_draining = True
        for server in self._servers:
            server.drain()

    def cut(self) -> None:
        """Let each end what still runs."""
        for server in self._servers:
            server.cut()

    async def wait_until_idle(self) -> None:
        """Until all have answered what they had, or are gone."""
        await asyncio.gather(*(server.idle.wait() for server in self._servers))

    async def close(self) -> None:
        """End those that have not ended; returns when all processes are gone."""
        self._is_draining = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(server.end() for server in self._servers))

    # -- loss

    async def _watch(self, place: int) -> None:
        """Start another in this place whenever the one in it has died."""
        try:
            while await self._replace(place):
                pass
        except OSError as error:  # such as too many processes
            self._give_up(f"an API server cannot be started anew: {error}")

    async def _replace(self, place: int) -> bool:
        """Wait until it dies, and start another; returns False where there is to be none."""
        server = self._servers[place]
        await server.lost.wait()
        await server.end()
        if self._is_draining or self._service.backend.failure is not None:
            return False
        fields = {"exit_code": server.exit_code, "requests": server.num_lost_requests}
        log.error("an API server died and is started anew", extra={"fields": fields})
        if not self._may_restart():
            self._give_up(f"{_MAX_DEATHS} API servers died within {_DEATHS_SECONDS:.0f} s")
            return False
        await asyncio.sleep(_RESTART_SECONDS)
        self._servers[place] = self._spawn(self._listeners[place])
        await self._servers[place].open(self._service, self._keep)
        return True

    def _give_up(self, failure: str) -> None:
        self.failure = failure
        self.failed.set()

    def _may_restart(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._deaths.append(now)
        while self._deaths[0] < now - _DEATHS_SECONDS:
            self._deaths.popleft()
        return len(self._deaths) < _MAX_DEATHS

    def _spawn(self, listener: socket.socket) -> "_ApiServer":
        ours, theirs = socket.socketpair()
        with withheld():
            process = self._start(theirs, listener)
        theirs.close()  # so that its death is an end of file here
        return _ApiServer(process, ours, self._kind)


def spawn(run: Callable[[Any], None], arguments: object) -> BaseProcess:
    """A process that runs `run`, which is given `arguments`."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run, args=(arguments,), name="evenhand-api", daemon=True)
    process.start()
    return process


class _ApiServer:
    """One process.

    Attributes:
        serving: done when it serves, or cannot.
        idle: set when it drains and has answered what it had, or is lost.
        lost: set when its channel has ended, as it does with the process.
        num_lost_requests: that it had in flight then.
    """

    def __init__(self, process: BaseProcess, end: socket.socket, kind: Any) -> None:
        self.serving: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.idle = asyncio.Event()
        self.lost = asyncio.Event()
        self.num_lost_requests = 0
        self._process = process
        self._end = end
        self._channel: Channel[Any] = Channel(kind, self._receive, self._lose)
        self._keeper: Keeper | None = None  # until the channel is open

    @property
    def is_serving(self) -> bool:
        return self.serving.done() and not self.lost.is_set()

    @property
    def is_current(self) -> bool:
        return self.lost.is_set() or (self._keeper is not None and self._keeper.is_current)

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    async def open(self, service: Service, keep: Callable[[Channel[Any]], Keeper]) -> None:
        self._keeper = keep(self._channel)
        await self._channel.open(self._end)
        self._keeper.enforce(service.in_force.config, is_configured=service.is_configured)

    def enforce(self, config: SchedulerConfig) -> None:
        if self._keeper is not None:
            self._keeper.enforce(config)

    def drain(self) -> None:
        self._channel.send(Drain())

    def cut(self) -> None:
        self._channel.send(Cut())

    async def end(self) -> None:
        """Returns when the process is gone; one that does not go by itself is killed."""
        self._channel.close()
        if self._keeper is None:
            self._end.close()
        await asyncio.get_running_loop().run_in_executor(None, self._join)

    def _join(self) -> None:
        if self.serving.done():  # one that starts has nothing to lose
            self._process.join(GRACE_SECONDS)
        self._process.kill()
        self._process.join()

    def _receive(self, message: Any) -> None:
        match message:
            case Serving():
                self.serving.set_result(None)
            case Idle():
                self.idle.set()
            case StartFailed():
                self._fail(message.message)
            case _:
                assert self._keeper is not None
                self._keeper.receive(message)

    def _lose(self) -> None:
        if self._keeper is not None:
            self.num_lost_requests = self._keeper.close()
        self._fail("an API server ended unexpectedly")
        self.lost.set()
        self.idle.set()

    def _fail(self, reason: str) -> None:
        if not self.serving.done():
            self.serving.set_exception(StartupError(reason))
            self.serving.exception()  # retrieved: nobody may be waiting
