"""Starts: one request begins in each turn of the event loop, so that those who begin hold up nobody's stream.

A request costs as much as dozens of events. Many that come at once would all be begun in one turn, and meanwhile no event would go on; so
they wait for each other, tenants in turn, and in between everything goes on that has come meanwhile. Where one comes alone it waits for
nothing.
"""

import asyncio
from collections import deque


class Starts:
    """Who may begin, on the event loop of the process."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # of tenants, in the order of their turns
        self._is_taken = False  # this turn of the loop

    async def turn(self, tenant_id: str) -> None:
        """Wait until a request of the tenant may begin; who is cancelled while it waits gives up its place."""
        if not self._is_taken:
            self._is_taken = True
            self._loop.call_soon(self._begin_next)
            return
        future = self._loop.create_future()
        self._queues.setdefault(tenant_id, deque()).append(future)
        await future

    def _begin_next(self) -> None:
        while self._queues:
            tenant_id = next(iter(self._queues))
            waiting = self._queues.pop(tenant_id)
            future = waiting.popleft()
            if waiting:
                self._queues[tenant_id] = waiting  # behind all others
            if not future.done():
                future.set_result(None)
                self._loop.call_soon(self._begin_next)
                return
        self._is_taken = False
