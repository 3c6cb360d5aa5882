"""What one body can do to everybody else: how long the event loop is held by it, and how much memory it takes while it is answered.

The server as `evenhand serve` runs it, before an engine core that only answers, or only waits; no model. Bodies of the largest size that
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
import uvloop

from evenhand_engine.backends.engine_client import ConnectedCore, SpawnedCore
from evenhand_engine.config import EngineConfig
from evenhand_engine.core.connections import Connections
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.messages import AbortRequest, AddRequest, EngineReady, Shutdown
from evenhand_engine.scheduler.request import FinishReason, RequestOutput
from evenhand_engine.server.startup import start_server

MAX_HELD_MS = 20.0
MAX_GROWTH = 2.0
CONTEXT = 131072
TICK_SECONDS = 0.001


def _many(element: str, size: int) -> str:
    return "[" + ",".join([element] * (size // (len(element) + 1))) + "]"


def shapes(size: int) -> dict[str, tuple[str, bytes]]:
    """Path and body by what is in it. A token of the vocabulary is a byte, so text that fits is as long as the context."""
    fits = min(size, CONTEXT - 64)
    texts = {
        "text that fits": '{"prompt":"' + "word " * (fits // 5) + '"}',
        "token ids that fit": '{"prompt":' + _many("97", 3 * fits) + "}",
        "text": '{"prompt":"' + "word " * (size // 5) + '"}',
        "token ids": '{"prompt":' + _many("97", size) + "}",
        "text that is cut": f'{{"truncate_prompt_tokens":{fits},"prompt":"' + "word " * (size // 5) + '"}',
        "short texts": '{"prompt":' + _many('""', size) + "}",
        "unknown member": '{"prompt":"x","junk":' + _many("[]", size) + "}",
        "unsupported member": '{"prompt":"x","documents":' + _many("{}", size) + "}",
        "stop strings": '{"prompt":"x","stop":' + _many('"a"', size) + "}",
        "logit bias": '{"prompt":"x","logit_bias":{' + ",".join(f'"{n}":1' for n in range(size // 12)) + "}}",
        "white space": '{"prompt":"x"' + " " * size + "}",
        "nesting": '{"prompt":"x","junk":' + "[" * size,
    }
    chats = {
        "messages": '{"messages":' + _many('{"role":"u"}', size) + "}",
        "parts": '{"messages":[{"role":"u","content":' + _many('{"type":"text","text":""}', size) + "}]}",
        "tool calls": '{"messages":[{"role":"u","tool_calls":' + _many("{}", size) + "}]}",
        "tools": '{"messages":[{"role":"u"}],"tools":' + _many("{}", size) + "}",
        "schema": '{"messages":[{"role":"u"}],"response_format":{"a":' + _many("{}", size) + "}}",
    }
    found = {name: ("/v1/completions", text.encode()) for name, text in texts.items()}
    return found | {name: ("/v1/chat/completions", text.encode()) for name, text in chats.items()}


def run_core(connection: Connection, doors: socket.socket, answers: bool) -> None:
    ready = EngineReady(
        model_name="none", max_model_len=CONTEXT, num_kv_blocks=64, block_size=16, dtype="float32", device="none"
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
            control.send((running.url, running.admin_url))
            watch = Watch()
            while await asyncio.to_thread(control.recv):
                control.send((watch.longest, psutil.Process().memory_info().rss))
                watch.longest = 0.0

    uvloop.run(serve())


class Server:
    """The server and its core, each a process of its own."""

    def __init__(self, model: Path, *, answers: bool) -> None:
        context = multiprocessing.get_context("spawn")
        to_core, from_server = context.Pipe(duplex=True)
        self._control, servers_control = context.Pipe(duplex=True)
        cores_doors, doors = socket.socketpair()
        self._core = context.Process(target=run_core, args=(to_core, cores_doors, answers), daemon=True)
        self._server = context.Process(target=run_server, args=(model, from_server, doors, servers_control))
        self._core.start()
        self._server.start()
        for end in (to_core, from_server, cores_doors, doors):
            end.close()
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


def longest_holds(model: Path, size: int, num_tries: int) -> dict[str, tuple[float, str]]:
    """Milliseconds by which each shape of a body holds the loop, and the status of its answer."""
    server, found = Server(model, answers=True), {}
    for name, (path, body) in shapes(size).items():
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


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    size, num_tries, num_bodies = (100_000, 2, 8) if options.quick else (4 * 2**20 - 4096, 20, 64)
    with tempfile.TemporaryDirectory() as folder:
        frontend.make_model(Path(folder))
        holds = longest_holds(Path(folder), size, num_tries)
        grown = growth(Path(folder), size, num_bodies)
    rows = [[name, status, f"{held:.1f}"] for name, (held, status) in holds.items()]
    common.print_table(f"one body of {size} bytes", ["in it", "status", "loop held for ms"], rows)
    rows = [[name, f"{ratio:.2f}"] for name, ratio in grown.items()]
    common.print_table(f"{num_bodies} bodies that wait", ["in them", "bytes for each counted"], rows)
    longest, most = max(held for held, _ in holds.values()), max(grown.values())
    is_held = longest <= MAX_HELD_MS and most <= MAX_GROWTH
    results = {"longest_ms": longest, "bytes_per_counted": most, "held": is_held}
    common.finish("bodies", results | {"holds": {name: held for name, (held, _) in holds.items()}, "growth": grown})


if __name__ == "__main__":
    main()
