"""FairExecutor: a few threads for long computations, which tenants use in turn."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[asyncio.Future[Any], Callable[[], Any]]


class FairExecutor:
    """Runs functions in threads. Each tenant's wait in a queue of their own, and the queues are served in turn.

    So a tenant that sends a thousand huge prompts delays another's by those that are being tokenized, not by those
    that wait.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="fair-executor")
        self._num_idle = num_threads
        self._queues: dict[str, deque[_Job]] = {}  # in the order of their turns

    async def run(self, tenant_id: str, function: Callable[[], T]) -> T:
        """The function's result; a caller that is cancelled while it waits gives up its place."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant_id, deque()).append((future, function))
        self._start_jobs()
        return await future

    def _start_jobs(self) -> None:
        while self._num_idle and self._queues:
            tenant_id, jobs = next(iter(self._queues.items()))
            del self._queues[tenant_id]
            future, function = jobs.popleft()
            if jobs:
                self._queues[tenant_id] = jobs  # behind all others
            if not future.cancelled():
                self._num_idle -= 1
                done = asyncio.get_running_loop().run_in_executor(self._threads, function)
                done.add_done_callback(lambda done, future=future: self._finish(done, future))  # type: ignore[misc]

    def _finish(self, done: asyncio.Future[Any], future: asyncio.Future[Any]) -> None:
        self._num_idle += 1
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
