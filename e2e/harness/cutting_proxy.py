"""A way to the API server that can be cut: TCP only, so TLS is still verified from end to end."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from harness.local_proxy import LocalProxy

_CHUNK_BYTES = 2**16


class CuttingProxy(LocalProxy):
    """Forwards connections to `server`.

    `cut` ends all that are open; while `is_open` is false, none is made. `num_cut` counts those that were ended.
    """

    def __init__(self, server: str) -> None:
        super().__init__()
        url = urlsplit(server)
        self._target = str(url.hostname), int(url.port or 443)
        self.is_open = True
        self.num_cut = 0
        self._connections: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def stop(self) -> None:
        self.is_open = False
        self._server.close()
        await self._end_all()

    def kubeconfig(self, of: Path) -> Path:
        """A kubeconfig as `of`, by this way."""
        cluster = yaml.safe_load(of.read_text())["clusters"][0]["cluster"]
        return self.write_kubeconfig(of, **cluster | {"server": f"https://127.0.0.1:{self.port}"})

    def cut(self) -> None:
        """End every connection, in the middle of whatever it carries."""
        self.num_cut += self.call(self._end_all())

    def cut_every(self, seconds: float, until: Callable[[], bool]) -> None:
        """Cut again and again, until it holds."""
        while not until():
            self.cut()
            time.sleep(seconds)

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
