"""WriteTimeout: ends the connection of a client that does not read its answer.

Without it such a client costs a socket, its buffers and an unread record for as long as it likes.
"""

import asyncio
from collections.abc import Awaitable
from typing import Self


class WriteTimeout:
    """Watches the writes of one answer. One timer for all of them, since a stream has thousands.

    Args:
        transport: of the client's connection; None if it is gone.
        seconds: for which one write may wait until what is buffered before it has been taken.

    Attributes:
        expired: the connection was ended, which cancels the handler.
    """

    def __init__(self, transport: asyncio.WriteTransport | None, seconds: float) -> None:
        self.expired = False
        self._transport = transport
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(self._seconds, self._check)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    async def wait(self, write: Awaitable[object]) -> None:
        """Await a write, for as long as it may take."""
        self._waiting_since = self._loop.time()
        try:
            await write
        finally:
            self._waiting_since = None

    def _check(self) -> None:
        now = self._loop.time()
        left = self._seconds if self._waiting_since is None else self._waiting_since + self._seconds - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        elif self._transport is not None:
            self.expired = True
            self._transport.abort()
