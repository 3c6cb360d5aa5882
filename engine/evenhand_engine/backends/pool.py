"""Connectors that do not hand out a pooled connection which the other side has ended meanwhile.

The event loop learns of such an end only at its next turn, and a busy one is late. A request on such a connection fails, and cannot be
told from one that was taken in.
"""

import asyncio
import select
from typing import Any

import aiohttp
from aiohttp.connector import Connection

_MOST_ENDED = 64  # at a time: an upstream that ends every connection at once is no reason to go on for ever


class _Live(aiohttp.BaseConnector):
    async def connect(self, *args: Any, **options: Any) -> Connection:
        """A connection, pooled or new, that has not ended."""
        connection = await super().connect(*args, **options)
        for _ in range(_MOST_ENDED):
            if not _has_ended(connection.transport):
                break
            connection.close()
            connection = await super().connect(*args, **options)
        return connection


class LiveTCPConnector(_Live, aiohttp.TCPConnector):
    """By TCP."""


class LiveUnixConnector(_Live, aiohttp.UnixConnector):
    """By a Unix socket."""


def _has_ended(transport: asyncio.Transport | None) -> bool:
    """Whether something came on a connection that is to be silent: its end, or what nobody asked for."""
    socket = None if transport is None else transport.get_extra_info("socket")
    if socket is None or socket.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))
