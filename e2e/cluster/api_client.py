"""The little of the Kubernetes API that the harness itself calls: JSON in, JSON out, and following a collection."""

import asyncio
import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import aiohttp

Object = dict[str, Any]

UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError)
"""What a call raises while the API server is away."""


class ApiError(Exception):
    """The API server refused."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether the same may succeed later, or has become superfluous: it is no mistake of the caller."""
        return self.status in (404, 409, 410, 429) or self.status >= 500


class ApiClient:
    """One connection pool to the API server, as the holder of a client certificate. Use within one event loop."""

    def __init__(self, server: str, authority: Path, certificate: Path, key: Path) -> None:
        tls = ssl.create_default_context(cafile=authority)
        tls.load_cert_chain(certificate, key)
        self._session = aiohttp.ClientSession(
            server,
            connector=aiohttp.TCPConnector(ssl=tls),
            timeout=aiohttp.ClientTimeout(total=60),
            read_bufsize=2**21,  # an event is one line, and an object may have 1.5 MiB
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await asyncio.sleep(0.1)  # the loop closes aborted TLS connections in rounds of its own

    async def call(
        self, method: str, path: str, body: Object | None = None, content_type: str = "application/json"
    ) -> Object:
        """One request. Raises ApiError, or one of UNREACHABLE."""
        data = json.dumps(body) if body is not None else None
        async with self._session.request(method, path, data=data, headers={"Content-Type": content_type}) as response:
            if response.status >= 400:
                raise ApiError(response.status, await response.text())
            result: Object = await response.json()
            return result

    async def follow(self, path: str, replace: Callable[[dict[str, Object]], None]) -> None:
        """Calls `replace` with all objects of a collection by uid, now and after each change; runs until cancelled.

        A lost connection is made again, from a list on, so that nothing that happened meanwhile is missed.
        """
        while True:
            try:
                listing = await self.call("GET", path)
                objects = {each["metadata"]["uid"]: each for each in listing["items"]}
                replace(objects)
                parameters = {"watch": "1", "resourceVersion": listing["metadata"]["resourceVersion"]}
                async with self._session.get(
                    path, params=parameters, timeout=aiohttp.ClientTimeout(connect=60)
                ) as events:
                    if events.status >= 400:
                        raise ApiError(events.status, await events.text())
                    async for line in events.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":  # our resourceVersion is too old
                            break
                        changed = event["object"]
                        objects.pop(changed["metadata"]["uid"], None)
                        if event["type"] != "DELETED":
                            objects[changed["metadata"]["uid"]] = changed
                        replace(objects)
            except UNREACHABLE:
                pass
            except ApiError as refused:
                if not refused.passes:
                    raise
            await asyncio.sleep(0.1)
