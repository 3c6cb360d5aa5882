"""A way to the API server by which every list comes in small pages, and something may happen in the middle of it."""

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp
from aiohttp import web

from harness.local_proxy import LocalProxy

_PAGE_SIZE = "2"
_OWN_HEADERS = ("Host", "Content-Length", "Transfer-Encoding")


class PagingProxy(LocalProxy):
    """Forwards requests; who asks is shown to the API server by its token.

    `amid` is called, once for each collection and program, before the second page of its list is asked for. `answers` counts
    what became of second pages and later ones, by the last part of the path, the first of the user agent, and the status.
    """

    def __init__(self, server: str, authority: Path, amid: Callable[[], None]) -> None:
        super().__init__()
        self._server = server
        self._tls = ssl.create_default_context(cafile=authority)
        self._amid = amid
        self._seen: set[tuple[str, str]] = set()
        self.answers: Counter[tuple[str, str, int]] = Counter()

    def kubeconfig(self, of: Path) -> Path:
        """A kubeconfig as `of`, by this way."""
        return self.write_kubeconfig(of, server=f"http://127.0.0.1:{self.port}")

    async def start(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0, force_close=True)
        self._session = aiohttp.ClientSession(self._server, connector=connector, timeout=timeout, auto_decompress=False)
        self._forgetting = asyncio.Lock()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()
        forwarding = asyncio.all_tasks() - {asyncio.current_task()}
        for each in forwarding:
            each.cancel()
        await asyncio.gather(*forwarding, return_exceptions=True)
        await asyncio.sleep(0.1)  # the loop closes aborted TLS connections in rounds of its own

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        who = request.path.rpartition("/")[2], request.headers.get("User-Agent", "").partition("/")[0]
        if "limit" in query:
            query["limit"] = _PAGE_SIZE
        is_later_page = "continue" in query
        if is_later_page:
            async with self._forgetting:
                if who not in self._seen:
                    self._seen.add(who)
                    await asyncio.to_thread(self._amid)
        headers = {name: value for name, value in request.headers.items() if name not in _OWN_HEADERS}
        body = await request.read()
        try:
            async with self._session.request(
                request.method, request.path, params=query, headers=headers, data=body or None
            ) as answer:
                if is_later_page:
                    self.answers[(*who, answer.status)] += 1
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                return response
        except aiohttp.ClientError as error:
            raise web.HTTPBadGateway(text=str(error)) from None
