"""Debounce: many signals, few wake-ups."""

import asyncio
import contextlib

_MANY = 8


class Debounce:
    """Wakes one waiter when signals have been quiet for `quiet` seconds, or `most` seconds after the first one.

    After many signals both are `patience` times as long: that is a large commit, and more of it is to come. For `rest` seconds
    after it has woken somebody it wakes nobody, however long it is quiet.
    """

    def __init__(self, quiet: float, most: float, patience: float = 1.0, rest: float = 0.0) -> None:
        self._quiet = quiet
        self._most = most
        self._patience = patience
        self._rest = rest
        self._rests_until = 0.0
        self._signalled = asyncio.Event()
        self._num_signals = 0  # since it was quiet
        self._first_at = 0.0

    def signal(self) -> None:
        """Something has changed."""
        self._num_signals += 1
        if not self._signalled.is_set():
            self._first_at = self._first_at or asyncio.get_running_loop().time()
            self._signalled.set()

    async def wait(self, timeout: float | None = None) -> float | None:
        """Returns the loop's time of the first signal since the last wait, or None after `timeout` without any."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                await self._signalled.wait()
                if (left := self._rests_until - loop.time()) > 0:
                    await asyncio.sleep(left)
        except TimeoutError:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._first_at + self._most) as limit:
                await self._until_quiet(limit)
        if not limit.expired():
            self._num_signals = 0
        self._signalled.clear()
        first_at, self._first_at = self._first_at, 0.0
        self._rests_until = loop.time() + self._rest
        return min(first_at, loop.time())

    async def _until_quiet(self, limit: asyncio.Timeout) -> None:
        """Raises TimeoutError once it is quiet."""
        while True:
            self._signalled.clear()
            patience = self._patience if self._num_signals > _MANY else 1.0
            limit.reschedule(self._first_at + self._most * patience)
            async with asyncio.timeout(self._quiet * patience):
                await self._signalled.wait()
