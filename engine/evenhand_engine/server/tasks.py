"""What start-up and shutdown are made of: an application on a socket, work in the background, waits."""

import asyncio
import contextlib
import gc
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.server.listener import BACKLOG, watch_certificate

if TYPE_CHECKING:
    from aiohttp import web

T = TypeVar("T")

_SWITCH_SECONDS = 0.001
# before garbage is looked for: a step of a thousand streams brings fewer, and they go at once
_NUM_YOUNG_OBJECTS = 10_000
GRACE_SECONDS = 1.0  # for the last events of the streams, once the engine is gone


def keep_loop_free() -> None:
    """Once a server has started: keep from its loop what else the interpreter would do first.

    What lives as long as the server need not be looked at for garbage again, nor is every step a reason to look: each of 256 streams
    would set off a collection, of 0.2 to 0.9 ms. And a thread that reads a large body hands over after a millisecond, or when the
    call that it is in has ended, instead of after five.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NUM_YOUNG_OBJECTS)


async def serve_app(
    stack: contextlib.AsyncExitStack,
    app: "web.Application",
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    *,
    decompress: bool = True,
) -> asyncio.AbstractServer:
    """Serve `app` until the stack is left; the result may be closed before, which refuses what connects and ends nothing."""
    from aiohttp import web

    from evenhand_engine.server.malformed import Protocol, keep_out_of_logs

    keep_out_of_logs()

    # A handler is cancelled when its client leaves, streaming or not: that aborts the request.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    stack.push_async_callback(runner.cleanup)
    await runner.setup()
    server, loop = runner.server, asyncio.get_running_loop()
    assert server is not None
    options: dict[str, Any] = {"access_log": None, "keepalive_timeout": 75, "auto_decompress": decompress}

    def connect() -> Protocol:
        return Protocol(server, loop=loop, **options)

    listening = await loop.create_server(connect, sock=listener, ssl=tls, backlog=BACKLOG)
    stack.callback(listening.close)
    return listening


async def serve_public(
    stack: contextlib.AsyncExitStack,
    app: "web.Application",
    listener: socket.socket,
    settings: ServerSettings,
    tls: ssl.SSLContext | None,
) -> asyncio.AbstractServer:
    """`serve_app` for clients: with a certificate that may be renewed, and bodies as they come."""
    listening = await serve_app(stack, app, listener, tls, decompress=False)  # `read_body` does
    if tls is not None:
        await stack.enter_async_context(background(watch_certificate(settings, tls)))
    return listening


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do `work` meanwhile; it is cancelled at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def first_of(*waits: Coroutine[Any, Any, object], timeout: float | None = None) -> None:
    """Wait for whichever is first, and give up the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def in_daemon_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread that an exit does not wait for, as it would for an executor's."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="start-up", daemon=True).start()
    return await future
