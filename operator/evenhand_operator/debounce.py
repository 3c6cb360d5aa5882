"""Debounce: many signals, few wake-ups."""

import asyncio
import contextlib


class Debounce:
    """Wakes one waiter when signals have been quiet for `quiet` seconds, or `most` seconds after the first one."""

    def __init__(self, quiet: float, most: float) -> None:
        self._quiet = quiet
        self._most = most
        self._signalled = asyncio.Event()
        self._first_at = 0.0

    def signal(self) -> None:
        """Something has changed."""
        if not self._signalled.is_set():
            self._first_at = self._first_at or asyncio.get_running_loop().time()
            self._signalled.set()

    async def wait(self, timeout: float | None = None) -> float | None:
        """Returns the loop's time of the first signal since the last wait, or None after `timeout` without any."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                await self._signalled.wait()
        except TimeoutError:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._first_at + self._most):
                await self._until_quiet()
        self._signalled.clear()
        first_at, self._first_at = self._first_at, 0.0
        return min(first_at, loop.time())

    async def _until_quiet(self) -> None:
        with contextlib.suppress(TimeoutError):
            while True:
                self._signalled.clear()
                async with asyncio.timeout(self._quiet):
                    await self._signalled.wait()
