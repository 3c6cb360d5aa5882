"""An API server within the test's own process: lists, pages and watches as a test wants them to be."""

import asyncio
import json
from collections import Counter, defaultdict
from typing import Any

from aiohttp import web


class ApiServer:
    """Answers lists from `objects` by kind and, where it is in the path, namespace, two objects to a page.

    Attributes:
        objects: by the end of the path, such as `pods` or `n/pods`.
        version: of lists.
        events: what watches tell, by kind; after that a watch is silent.
        watched: how many watches there are, by kind.
        watch_lines: what any watch sends instead, in these pieces; then it ends.
        refusals: status, body and headers of the next answers.
        page: what any request is answered, by somebody who is no API server; None: nothing.
        refused: status of requests, by the end of the path.
        forbidden: namespaces of which nothing is told.
    """

    def __init__(self) -> None:
        self.version = 50
        self.objects: dict[str, list[dict[str, Any]]] = {}
        self.events: dict[str, asyncio.Queue[dict[str, Any]]] = defaultdict(asyncio.Queue)
        self.watched: Counter[str] = Counter()
        self.watch_lines: list[bytes] = []
        self.refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        self.page: str | None = None
        self.refused: dict[str, int] = {}
        self.forbidden: set[str] = set()
        self.requests: list[web.Request] = []
        self.token = "first"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Any request."""
        self.requests.append(request)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"message": "Unauthorized"}, status=401)
        if self.page is not None:
            return web.Response(text=self.page, content_type="text/html")
        if self.refusals:
            status, body, headers = self.refusals.pop(0)
            return web.json_response(body, status=status, headers=headers)
        for end, status in self.refused.items():
            if request.path.endswith(end):
                return web.json_response({"message": f"not {end}"}, status=status)
        if any(f"/namespaces/{each}/" in request.path for each in self.forbidden):
            return web.json_response({"message": "forbidden"}, status=403)
        if request.method != "GET":
            return web.json_response(json.loads(await request.text()))
        if "watch" in request.query:
            return await self._watch(request)
        kind = request.path.rpartition("/")[2]
        of_namespace = "/".join(request.path.split("/")[-2:])
        found = self.objects.get(of_namespace, self.objects.get(kind, []))
        start = int(request.query.get("continue", "0"))
        metadata = {"resourceVersion": str(self.version)}
        if start + 2 < len(found):
            metadata["continue"] = str(start + 2)
        return web.json_response({"metadata": metadata, "items": found[start : start + 2]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in self.watch_lines:
            await response.write(piece)
        kind = request.path.rpartition("/")[2]
        self.watched[kind] += 1
        try:
            while not self.watch_lines:
                event = await self.events[kind].get()
                if event["type"] == "CUT":
                    break
                await response.write(json.dumps(event).encode() + b"\n")
        finally:
            self.watched[kind] -= 1
        return response
