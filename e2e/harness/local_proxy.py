"""What proxies between an operator and its API server have in common: a thread, a port of loopback, a kubeconfig that leads there."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from cluster.ports import free_ports

_T = TypeVar("_T")


class LocalProxy(ABC):
    """Serves `port` of 127.0.0.1 while it is entered, from an event loop in a thread of its own."""

    def __init__(self) -> None:
        [self.port] = free_ports(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=type(self).__name__)

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def stop(self) -> None:
        """Leave no task and no connection behind."""

    def __enter__(self) -> Self:
        self._thread.start()
        self.call(self.start())
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)

    def write_kubeconfig(self, of: Path, **cluster: str) -> Path:
        """A kubeconfig beside `of` and with its users, whose cluster is `cluster`."""
        config = yaml.safe_load(of.read_text())
        config["clusters"][0]["cluster"] = cluster
        path = of.with_name(f"{of.stem}-by-{self.port}.kubeconfig")
        path.write_text(yaml.safe_dump(config))
        return path
