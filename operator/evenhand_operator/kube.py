"""KubeClient: the requests that the operator sends to the API server, but for those of Kopf."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, TypeVar

import aiohttp
import kopf
import msgspec

from evenhand_operator import metrics
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.objects import Json
from evenhand_operator.resources import Resource

FIELD_MANAGER = "evenhand-operator"
PAGE_SIZE = 500
REQUEST_SECONDS = 15.0
_MOST_TRIES = 3
_LONGEST_PAUSE_SECONDS = 10.0
_UNANSWERED_SECONDS = 30.0
_CONNECT_SECONDS = 5.0
_WATCH_SECONDS = 250.0
_SILENCE_SECONDS = 120.0  # of a watch: a bookmark comes about once a minute
_SHOWN_CHARACTERS = 500
T = TypeVar("T")


class ApiError(Exception):
    """The API server refused a request, or could not be reached (`status` 0).

    Attributes:
        status: of the answer.
        retry_after: seconds that the server asks to wait; 0 where it does not.
    """

    def __init__(self, status: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.retry_after = retry_after

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (0, 408, 429) or self.status >= 500


class Listing(NamedTuple):
    """All objects of a kind at one moment. `version` orders it among resource versions."""

    items: list[Json]
    version: int


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str
    next_page: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    metadata: _ListMetadata
    items: list[Json]


class _WatchEvent(msgspec.Struct):
    type: str
    object: Json


class KubeClient:
    """One connection pool, reused. Use within one event loop.

    Every method raises ApiError. Credentials are read again when they are no longer accepted, and when nobody has answered for
    half a minute; a request that was too much (429) is sent again after as long as the server asks for.
    """

    def __init__(self, log_in: Callable[[], kopf.ConnectionInfo], clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._log_in = log_in
        self._info = log_in()
        self._answered_at = self._clock.monotonic()
        self._session = self._connect()

    def _connect(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self._info.server,
            connector=aiohttp.TCPConnector(ssl=self._info.as_ssl_context(), limit=0),
            timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
            headers={
                "User-Agent": FIELD_MANAGER,
                "Accept": "application/json, application/jwk-set+json",
                "Accept-Encoding": "identity",  # compressing takes the API server longer than sending within a cluster
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=self._info.proxy_url,
            trust_env=False,
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    @property
    def credentials(self) -> kopf.ConnectionInfo:
        """With which it asks now; another object once they were read again."""
        return self._info

    async def list_pages(self, resource: Resource, namespace: str | None, **parameters: str) -> AsyncIterator[Listing]:
        """All objects, a page at a time, so that never all are in memory as JSON; every page is of the same moment.

        The API server makes the next page while the caller looks at one.
        """

        async def fetch(**position: str) -> _Page:
            query = {"limit": str(PAGE_SIZE), **parameters, **position}
            return _read(await self._call("GET", resource.path(namespace), query=query), _Page)

        coming = asyncio.create_task(fetch())
        try:
            while True:
                page = await coming
                if page.metadata.next_page:
                    coming = asyncio.create_task(fetch(**{"continue": page.metadata.next_page}))
                yield Listing(page.items, int(page.metadata.resource_version))
                if not page.metadata.next_page:
                    return
        finally:
            coming.cancel()

    async def watch(
        self, resource: Resource, namespace: str | None, version: int, **parameters: str
    ) -> AsyncIterator[tuple[str, Json]]:
        """Events after that version, bookmarks among them, until the API server ends it; 410: it has forgotten it."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": str(version),
            "timeoutSeconds": str(round(self._clock.spread(_WATCH_SECONDS))),
            **parameters,
        }
        async for line in self._stream(resource.path(namespace), query):
            try:
                event = msgspec.json.decode(line, type=_WatchEvent)
            except msgspec.DecodeError as error:
                raise ApiError(0, f"watch: {error}") from None
            if event.type == "ERROR":
                raise ApiError(int(event.object.get("code", 500)), f"watch: {event.object.get('message', '')}")
            yield event.type, event.object

    async def _stream(self, path: str, query: dict[str, str]) -> AsyncIterator[bytes]:
        """Lines of an answer without end."""
        timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        headers, line = self._info.as_http_headers(), bytearray()
        try:
            async with self._session.get(path, headers=headers, params=query, timeout=timeout) as response:
                if response.status >= 400:
                    message = f"GET {path}: {_message(await response.read())}"
                    raise ApiError(response.status, message)
                async for chunk in response.content.iter_any():
                    *lines, rest = chunk.split(b"\n")
                    for each in lines:
                        yield bytes(line + each)
                        line.clear()
                    line += rest
        except TimeoutError:
            raise ApiError(0, f"GET {path}: silent for {_SILENCE_SECONDS:.0f} s") from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise ApiError(0, f"GET {path}: {error}") from None

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """One object."""
        return _json(await self._call("GET", resource.path(namespace, name)))

    async def get_raw(self, path: str) -> Json:
        """Any document of the API server."""
        return _json(await self._call("GET", path))

    async def apply(
        self, resource: Resource, obj: Json, subresource: str | None = None, *, manager: str = FIELD_MANAGER
    ) -> Json:
        """Server-side apply. With a uid in the metadata, another object of the same name is left alone (409)."""
        path = resource.path(obj["metadata"].get("namespace"), obj["metadata"]["name"], subresource)
        query = {"fieldManager": manager, "force": "true"}
        metrics.API_WRITES.labels(_label(resource, subresource)).inc()
        return _json(await self._call("PATCH", path, _typed(resource, obj), "application/apply-patch+yaml", query))

    async def create(self, resource: Resource, obj: Json) -> Json:
        """A new object; 409 where there is one of that name."""
        metrics.API_WRITES.labels(_label(resource)).inc()
        path = resource.path(obj["metadata"].get("namespace"))
        return _json(await self._call("POST", path, _typed(resource, obj)))

    async def replace(self, resource: Resource, obj: Json) -> Json:
        """Compare and swap: 409 unless the object still has the resource version that is in `obj`."""
        metrics.API_WRITES.labels(_label(resource)).inc()
        path = resource.path(obj["metadata"].get("namespace"), obj["metadata"]["name"])
        return _json(await self._call("PUT", path, _typed(resource, obj)))

    async def _call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        content_type: str = "application/json",
        query: dict[str, str] | None = None,
    ) -> bytes:
        data = msgspec.json.encode(body) if body is not None else None
        tries = _MOST_TRIES
        while True:
            tries -= 1
            try:
                answer = await self._request(method, path, data, content_type, query)
            except ApiError as error:
                if not await self._may_try_again(error) or not tries:
                    raise
            else:
                self._answered_at = self._clock.monotonic()
                return answer

    async def _may_try_again(self, error: ApiError) -> bool:
        """Waits as long as the server asks for, and brings the credentials up to date where they may be why it failed.

        What has not answered for long may be asked with an authority that was replaced, of which nothing but the content
        of a file tells.
        """
        if error.status == 429 and 0 < error.retry_after <= _LONGEST_PAUSE_SECONDS:
            await asyncio.sleep(error.retry_after)
            return True
        if error.status == 0 and self._clock.monotonic() - self._answered_at > _UNANSWERED_SECONDS:
            self._answered_at = self._clock.monotonic()
            await self._renew_credentials(self._log_in())
        elif error.status == 401 and (info := self._log_in()) != self._info:
            await self._renew_credentials(info)
            return True
        return False

    async def _renew_credentials(self, info: kopf.ConnectionInfo) -> None:
        self._info, outdated = info, self._session
        self._session = self._connect()
        await asyncio.sleep(0)  # other requests may still be in it; they fail and are sent again
        await outdated.close()

    async def _request(
        self, method: str, path: str, data: bytes | None, content_type: str, query: dict[str, str] | None
    ) -> bytes:
        headers = self._info.as_http_headers() | ({"Content-Type": content_type} if data is not None else {})
        try:
            async with self._session.request(method, path, data=data, headers=headers, params=query) as response:
                body = await response.read()
        except TimeoutError:
            raise ApiError(0, f"{method} {path}: no answer within {REQUEST_SECONDS:.0f} s") from None
        except (aiohttp.ClientError, OSError, RuntimeError) as error:  # RuntimeError: the session was just closed
            raise ApiError(0, f"{method} {path}: {error}") from None
        if response.status >= 400:
            retry_after = response.headers.get("Retry-After", "0")
            message = f"{method} {path}: {_message(body)}"
            raise ApiError(response.status, message, float(retry_after) if retry_after.isdigit() else 0.0)
        return body


def _json(body: bytes) -> Json:
    return _read(body, dict[str, Any])


def _read(body: bytes, expected: type[T]) -> T:
    """An answer without an error; what stands between us and the API server may say that with a page of its own."""
    try:
        return msgspec.json.decode(body, type=expected)
    except msgspec.DecodeError as error:
        raise ApiError(0, f"the answer is none of an API server: {error}") from None


def _typed(resource: Resource, obj: Json) -> Json:
    return {"apiVersion": resource.api_version, "kind": resource.kind, **obj}


def _message(body: bytes) -> str:
    """What a Status object says."""
    try:
        return str(_json(body).get("message", ""))[:_SHOWN_CHARACTERS]
    except ApiError:
        return body[:_SHOWN_CHARACTERS].decode("utf-8", "replace")


def _label(resource: Resource, subresource: str | None = None) -> str:
    return f"{resource.plural}/{subresource}" if subresource else resource.plural
