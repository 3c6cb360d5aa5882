"""UpstreamConnection: the way to an engine that somebody else wrote, from one process."""

from dataclasses import dataclass
from pathlib import Path

import aiohttp
from yarl import URL

from evenhand_engine.backends.pool import LiveTCPConnector, LiveUnixConnector

_KEEPALIVE_SECONDS = 4.0  # uvicorn and llama.cpp close after 5 s of silence, perhaps while a request is on its way


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """How the upstream is reached.

    Attributes:
        url: its origin, such as http://127.0.0.1:8001; with `socket`, only the Host header is taken from it.
        socket: path of a Unix socket to connect to instead.
        api_key: sent as its bearer token; a client's own credential is ours and never goes on.
        connect_timeout: seconds for a connection; one that cannot be made is tried again until then, as nothing was sent.
        idle_timeout: seconds without a byte of an answer after which it has failed.
        max_model_len: the upstream's context.
        kv_tokens: size of its KV cache in tokens; None: what it says of itself.
        max_num_seqs: requests that it runs at once; None: what it says of itself.
    """

    url: str
    socket: Path | None = None
    api_key: str | None = None
    connect_timeout: float = 5.0
    idle_timeout: float = 600.0
    max_model_len: int = 131_072
    kv_tokens: int | None = None
    max_num_seqs: int | None = None


class UpstreamConnection:
    """A pooled session with the upstream, on the event loop of the process.

    Attributes:
        backend: which engine it is, as far as it says; known to whoever probes it, who tells.
    """

    def __init__(self, settings: UpstreamSettings) -> None:
        self.settings = settings
        self.backend = "unknown"
        self._origin = settings.url.rstrip("/")
        # No limit of connections: aiohttp's own of 100 would be a window that nobody sees.
        connector: aiohttp.BaseConnector
        if settings.socket is not None:
            connector = LiveUnixConnector(str(settings.socket), limit=0, keepalive_timeout=_KEEPALIVE_SECONDS)
        else:
            connector = LiveTCPConnector(limit=0, ttl_dns_cache=10, keepalive_timeout=_KEEPALIVE_SECONDS)
        self.session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=settings.connect_timeout, sock_read=settings.idle_timeout
            ),
        )

    def url(self, raw_path: str) -> URL:
        """Where a request for this path and query, as the client wrote it, goes."""
        return URL(self._origin + raw_path, encoded=True)

    def without_origin(self, location: str) -> str:
        """A place at the upstream as clients reach it through this server; any other as it is."""
        rest = location.removeprefix(self._origin)
        return rest if rest.startswith("/") else location

    @property
    def is_closed(self) -> bool:
        """Whether it was cut, by `close`."""
        return self.session.closed

    @property
    def authorization(self) -> dict[str, str]:
        """The header that proves to the upstream who asks; empty where it wants none."""
        return {} if self.settings.api_key is None else {"Authorization": f"Bearer {self.settings.api_key}"}

    async def close(self) -> None:
        """Cut every connection to the upstream; what is in flight ends."""
        await self.session.close()
