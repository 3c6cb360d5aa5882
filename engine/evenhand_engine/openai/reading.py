"""read_request: from a client's bytes to what a handler works with, holding no more memory than that takes."""

from array import array
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web

from evenhand_engine.frontend.engine_service import ENGINE
from evenhand_engine.frontend.keys import BODY, TENANT_ID
from evenhand_engine.frontend.requests import read_body

T = TypeVar("T", bound=tuple[Any, ...])


async def read_request(request: web.Request, read: Callable[[bytes], T]) -> T:
    """What `read` makes of the body, which is dropped then. `read` runs in a thread if the body is large.

    From then on the tenant is held to account for the token ids, texts and bytes in the result alone.
    """
    raw = await read_body(request)
    result = await request.app[ENGINE].compute(request[TENANT_ID], len(raw), lambda: read(raw))
    if (held := request.get(BODY)) is not None:
        held.resize(num_bytes(result))
    return result


def num_bytes(value: object) -> int:
    """Of the arrays, texts and bytes in it."""
    if isinstance(value, array):
        return len(value) * value.itemsize
    if isinstance(value, list | tuple):
        return sum(map(num_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 0
