"""The operator's own port: `/metrics` for Prometheus, `/healthz` and `/readyz` for the kubelet."""

import contextlib
import errno
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from evenhand_operator import metrics
from evenhand_operator.cache import Cache


@dataclass(frozen=True, slots=True)
class Health:
    """What the probes ask; each answers None while all is well, else what is wrong."""

    alive: Callable[[], str | None]
    ready: Callable[[], str | None]


@contextlib.asynccontextmanager
async def serving(host: str, port: int, cache: Cache, health: Health) -> AsyncIterator[int]:
    """Serves while it is entered; yields the port. Raises OSError where it is taken."""

    async def show_metrics(_: web.Request) -> web.Response:
        _count_policies(cache)
        return web.Response(body=generate_latest(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", show_metrics),
            web.get("/healthz", _probe(health.alive)),
            web.get("/readyz", _probe(health.ready)),
        ]
    )
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.SockSite(runner, listen(host, port)).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; `::` is every address of both families, where the machine has IPv6. Raises OSError."""
    if host != "::":
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        return socket.create_server(("0.0.0.0", port))


def _probe(check: Callable[[], str | None]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        problem = check()
        return web.Response(text=problem or "ok", status=503 if problem else 200)

    return answer


def _count_policies(cache: Cache) -> None:
    """By what their statuses say, so that replicas that do not lead tell the same."""
    policies = Counter(
        (condition.type, str(condition.status)) for each in cache.policies for condition in each.status.conditions
    )
    pods = Counter(str(row.state) for pool in cache.pools for row in pool.status.pods)
    metrics.POLICIES.clear()
    for labels, count in policies.items():
        metrics.POLICIES.labels(*labels).set(count)
    metrics.PODS.clear()
    for state, count in pods.items():
        metrics.PODS.labels(state).set(count)
