"""A way to the API server that can be cut: TCP only, so TLS is still verified from end to end."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

from cluster.ports import free_ports

_CHUNK_BYTES = 2**16


class CuttingProxy:
    """Forwards connections to `server` while it is entered, from a thread of its own.

    `cut` ends all that are open; while `is_open` is false, none is made. `num_cut` counts those that were ended.
    """

    def __init__(self, server: str) -> None:
        url = urlsplit(server)
        self._target = str(url.hostname), int(url.port or 443)
        [self._port] = free_ports(1)
        self.is_open = True
        self.num_cut = 0
        self._connections: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cutting proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", self._port))
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self._server.close()
        self._call(self._end_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def kubeconfig(self, of: Path) -> Path:
        """A kubeconfig as `of`, by this way."""
        config = yaml.safe_load(of.read_text())
        config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{self._port}"
        path = of.with_name(f"{of.stem}-by-{self._port}.kubeconfig")
        path.write_text(yaml.safe_dump(config))
        return path

    def cut(self) -> None:
        """End every connection, in the middle of whatever it carries."""
        self.num_cut += self._call(self._end_all())

    def cut_every(self, seconds: float, until: Callable[[], bool]) -> None:
        """Cut again and again, until it holds."""
        while not until():
            self.cut()
            time.sleep(seconds)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)

    async def _end_all(self) -> int:
        connections = list(self._connections)
        for each in connections:
            each.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        return len(connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        writers = [writer]
        try:
            if self.is_open:
                back, forth = await asyncio.open_connection(*self._target)
                writers.append(forth)
                await asyncio.gather(_copy(reader, forth), _copy(back, writer))
        except (OSError, asyncio.CancelledError):
            pass  # that is what it is for
        finally:
            self._connections.discard(task)
            for each in writers:
                each.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
