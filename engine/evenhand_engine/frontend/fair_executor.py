"""FairExecutor: a few threads for long computations, which tenants use in turn."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[asyncio.Future[Any], Callable[[], Any]]


class FairExecutor:
    """Runs functions in threads. Each tenant's wait in a queue of their own, and the queues are served in turn.

    A tenant uses one thread at a time, so that one that sends a thousand huge prompts does not delay another's at all
    while there is more than one thread.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="fair-executor")
        self._num_idle = num_threads
        self._queues: dict[str, deque[_Job]] = {}  # in the order of their turns
        self._running: set[str] = set()  # tenants

    async def run(self, tenant_id: str, function: Callable[[], T]) -> T:
        """The function's result; a caller that is cancelled while it waits gives up its place."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant_id, deque()).append((future, function))
        self._start_jobs()
        return await future

    def _start_jobs(self) -> None:
        while self._num_idle and (tenant_id := self._next_tenant()) is not None:
            jobs = self._queues.pop(tenant_id)
            future, function = jobs.popleft()
            if jobs:
                self._queues[tenant_id] = jobs  # behind all others
            if not future.cancelled():
                self._num_idle -= 1
                self._running.add(tenant_id)
                done = asyncio.get_running_loop().run_in_executor(self._threads, function)
                done.add_done_callback(functools.partial(self._finish, tenant_id, future))

    def _next_tenant(self) -> str | None:
        return next((tenant_id for tenant_id in self._queues if tenant_id not in self._running), None)

    def _finish(self, tenant_id: str, future: asyncio.Future[Any], done: asyncio.Future[Any]) -> None:
        self._num_idle += 1
        self._running.remove(tenant_id)
        if done.cancelled():
            future.cancel()
        elif not future.cancelled():
            if (error := done.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result())
        self._start_jobs()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
