"""Loading: what the ports answer while there is no engine yet to answer: that it is coming, and how far it has come."""

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Sequence

from evenhand_engine.model.progress import listening
from evenhand_engine.server.tasks import background, serve_app

_PATIENCE_SECONDS = 5.0
"""A client that connects during a start which is shorter waits, and need not ask again."""


@contextlib.asynccontextmanager
async def tell_of_loading(listeners: Sequence[tuple[socket.socket, ssl.SSLContext | None]]) -> AsyncIterator[None]:
    """Meanwhile, once it has lasted for some seconds, answer whoever connects. The listeners stay open."""
    last_said = deque(["starting"], maxlen=1)
    with listening(last_said.append):
        async with background(_answer(listeners, last_said)):
            yield


async def _answer(listeners: Sequence[tuple[socket.socket, ssl.SSLContext | None]], last_said: deque[str]) -> None:
    """Until cancelled."""
    await asyncio.sleep(_PATIENCE_SECONDS)
    from aiohttp import web

    from evenhand_engine.openai.errors import error_response, refuse_loading

    async def refuse(request: web.Request) -> web.Response:
        response = error_response(refuse_loading(last_said[0]))
        response.force_close()  # the next request is for another application
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    async with contextlib.AsyncExitStack() as stack:
        for listener, tls in listeners:
            await serve_app(stack, app, listener.dup(), tls)
        await asyncio.Event().wait()
