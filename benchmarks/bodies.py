"""What one body can do to everybody else: how long the event loop is held by it, and how much memory it takes while it is answered.

`--sidecar`: the loop of `evenhand sidecar`, with bodies of 32 MiB, before a server that reads them and answers nothing. Else the server as `evenhand serve` runs it, before an engine core that only answers, or only waits; no model. Bodies of the largest size that
is allowed, of every shape that is dear to read, one at a time: a timer of a millisecond in the server's loop tells by how much it
came too late at most. Least of several tries, since a shared machine holds the loop too. Then as many bodies as a tenant may have in
flight: by how much the process has grown, for each byte that is counted against `--max-tenant-body-bytes`, four a token.
"""

import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import common
import frontend
import psutil
import serving
import uvloop
from aiohttp import web
from body_shapes import CONTEXT, LARGE_CONTEXT, fitting, large_shapes, shapes

from evenhand_engine.backends.engine_client import ConnectedCore, SpawnedCore
from evenhand_engine.backends.upstream_connection import UpstreamSettings
from evenhand_engine.config import EngineConfig
from evenhand_engine.core.connections import Connections
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.messages import AbortRequest, AddRequest, EngineReady, Shutdown
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_engine.server.sidecar_startup import start_sidecar
from evenhand_engine.server.startup import start_server

MAX_HELD_MS = 20.0
MAX_GROWTH = 2.0
TICK_SECONDS = 0.001
LARGE_BYTES = 32 * 2**20 - 4096


def run_upstream(port: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.can_read_body:
            await request.read()
        return web.json_response({})

    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


def run_sidecar(port: int, control: Connection) -> None:
    """As `run_server`."""

    async def serve() -> None:
        settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0, max_request_bytes=LARGE_BYTES + 4096)
        async with start_sidecar(settings, UpstreamSettings(url=f"http://127.0.0.1:{port}")) as running:
            await tell(running.url, running.admin_url, control)

    uvloop.run(serve())


def run_core(connection: Connection, doors: socket.socket, answers: bool, context: int) -> None:
    ready = EngineReady(
        model_name="none", max_model_len=context, num_kv_blocks=64, block_size=16, dtype="float32", device="none"
    )
    connections = Connections(connection, doors, ready)
    connections.start()
    while not isinstance(message := connections.commands.get(), Shutdown):
        if isinstance(message, AddRequest) and answers:
            end = RequestOutput(request_id=message.request_id, token_ids=(97,), finish_reason=FinishReason.LENGTH)
            connections.publish([end])
        elif isinstance(message, AbortRequest):
            connections.publish([RequestOutput(request_id=message.request_id, finish_reason=message.reason)])


class Watch:
    """By how much a timer in this loop comes too late."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.longest = 0.0
        self._wait()

    def _wait(self) -> None:
        self._due = time.perf_counter() + TICK_SECONDS
        self._loop.call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self.longest = max(self.longest, time.perf_counter() - self._due)
        self._wait()


def run_server(model: Path, core: Connection, doors: socket.socket, control: Connection) -> None:
    """Tells where it serves; then, whenever it is asked, the longest delay since and its bytes of memory. None ends it."""

    async def serve() -> None:
        settings = ServerSettings(host="127.0.0.1", port=0, admin_port=0)
        process = SpawnedCore(ConnectedCore(core), doors)
        async with start_server(settings, EngineConfig(model=str(model)), spawn=lambda _: (process, core)) as running:
            await tell(running.url, running.admin_url, control)

    uvloop.run(serve())


async def tell(url: str, admin_url: str, control: Connection) -> None:
    """Where this process serves; then, whenever it is asked, the longest delay since and its bytes of memory."""
    control.send((url, admin_url))
    watch = Watch()
    while await asyncio.to_thread(control.recv):
        control.send((watch.longest, psutil.Process().memory_info().rss))
        watch.longest = 0.0


class Loaded:
    """A server in a process of its own, and what is behind it in another."""

    _server: multiprocessing.process.BaseProcess
    _core: multiprocessing.process.BaseProcess
    _control: Connection

    def _await(self) -> None:
        url, self._admin_url = self._control.recv()
        self._address = urlsplit(url)

    def send(self, path: str, body: bytes) -> socket.socket:
        """A connection that has sent this; its answer is still to be read."""
        connection = socket.create_connection((self._address.hostname, self._address.port), timeout=120)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def look(self) -> tuple[float, int]:
        """The longest delay of the loop since the last look, and the bytes of its process."""
        self._control.send(True)
        found: tuple[float, int] = self._control.recv()
        return found

    def counted(self, num_bodies: int) -> int:
        """Bytes of its tenant, once so many requests are in the hands of the core."""
        while True:
            with urllib.request.urlopen(f"{self._admin_url}/v1/tenants", timeout=30) as answer:
                tenants = json.load(answer)["tenants"]
            if tenants and tenants[0]["inFlight"] == num_bodies:
                return int(tenants[0]["bodyBytes"])
            time.sleep(0.1)

    def end(self) -> None:
        self._control.send(None)
        self._server.join(10)
        self._core.kill()


class Server(Loaded):
    """Ours, and a core that does not compute."""

    def __init__(self, model: Path, *, answers: bool, context: int = CONTEXT) -> None:
        spawn = multiprocessing.get_context("spawn")
        to_core, from_server = spawn.Pipe(duplex=True)
        self._control, servers_control = spawn.Pipe(duplex=True)
        cores_doors, doors = socket.socketpair()
        self._core = spawn.Process(target=run_core, args=(to_core, cores_doors, answers, context), daemon=True)
        self._server = spawn.Process(target=run_server, args=(model, from_server, doors, servers_control))
        self._core.start()
        self._server.start()
        for end in (to_core, from_server, cores_doors, doors):
            end.close()
        self._await()


class Sidecar(Loaded):
    """A sidecar, and an upstream that answers nothing."""

    def __init__(self) -> None:
        context, port = multiprocessing.get_context("spawn"), serving.free_port()
        self._control, control = context.Pipe(duplex=True)
        self._core = context.Process(target=run_upstream, args=(port,), daemon=True)
        self._server = context.Process(target=run_sidecar, args=(port, control))
        self._core.start()
        self._server.start()
        control.close()
        self._await()


def longest_holds(server: Loaded, bodies: dict[str, tuple[str, bytes]], num_tries: int) -> dict[str, tuple[float, str]]:
    """Milliseconds by which each shape of a body holds the loop, and the status of its answer."""
    found = {}
    for name, (path, body) in bodies.items():
        holds = []
        for _ in range(num_tries):
            server.look()
            with server.send(path, body) as connection:
                status = connection.recv(4096)[9:12].decode()
            holds.append(1000 * server.look()[0])
        found[name] = min(holds), status
    server.end()
    return found


def growth(model: Path, size: int, num_bodies: int) -> dict[str, float]:
    """Bytes by which the server grows for each that is counted, by what is in the bodies that it holds."""
    found = {}
    for name in ("text that fits", "token ids that fit"):
        server = Server(model, answers=False)
        path, body = shapes(size)[name]
        connections = [server.send(path, body)]  # makes what is made once, too
        counted = server.counted(1)
        before = server.look()[1]
        for number in range(1, num_bodies):
            connections.append(server.send(path, body))
            server.counted(number + 1)
        found[name] = (server.look()[1] - before) / (server.counted(num_bodies) - counted)
        for connection in connections:
            connection.close()
        server.end()
    return found


def show_holds(size: int, holds: dict[str, tuple[float, str]]) -> None:
    rows = [[name, status, f"{held:.1f}"] for name, (held, status) in holds.items()]
    common.print_table(f"one body of {size} bytes", ["in it", "status", "loop held for ms"], rows)


def measure_sidecar(size: int, num_tries: int) -> None:
    holds = longest_holds(Sidecar(), large_shapes(size), num_tries)
    show_holds(size, holds)
    longest = max(held for held, _ in holds.values())
    results = {
        "longest_ms": longest,
        "held": longest <= MAX_HELD_MS,
        "holds": {name: held for name, (held, _) in holds.items()},
    }
    common.finish("bodies", results)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--sidecar", action="store_true", help="a sidecar's loop, and larger bodies")
    options = parser.parse_args()
    if options.sidecar:
        measure_sidecar(LARGE_BYTES // 16 if options.quick else LARGE_BYTES, 2 if options.quick else 5)
        return
    size, num_tries, num_bodies = (100_000, 2, 8) if options.quick else (4 * 2**20 - 4096, 20, 64)
    with tempfile.TemporaryDirectory() as folder:
        frontend.make_model(Path(folder))
        holds = longest_holds(Server(Path(folder), answers=True), shapes(size), num_tries)
        server = Server(Path(folder), answers=True, context=LARGE_CONTEXT)
        large = longest_holds(server, fitting(size, LARGE_CONTEXT), num_tries)
        holds |= {f"{name} a million": held for name, held in large.items()}
        grown = growth(Path(folder), size, num_bodies)
    show_holds(size, holds)
    rows = [[name, f"{ratio:.2f}"] for name, ratio in grown.items()]
    common.print_table(f"{num_bodies} bodies that wait", ["in them", "bytes for each counted"], rows)
    longest, most = max(held for held, _ in holds.values()), max(grown.values())
    is_held = longest <= MAX_HELD_MS and most <= MAX_GROWTH
    results = {"longest_ms": longest, "bytes_per_counted": most, "held": is_held}
    common.finish("bodies", results | {"holds": {name: held for name, (held, _) in holds.items()}, "growth": grown})


if __name__ == "__main__":
    main()
