"""Kopf's part: it watches, and hands every event to the cache. It writes nothing: no annotations, no finalizers.

It has a thread and a loop of its own. For each object that is new to it, Kopf needs a turn of the loop, so in a loop that
also writes thousands of statuses its first list takes minutes, and changes are not seen before it has ended.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import kopf

from evenhand_operator.cache import Cache
from evenhand_operator.kube import ENGINE_POOLS, NAMESPACES, PAGE_SIZE, PODS, SECRETS, TENANT_POLICIES, Resource
from evenhand_operator.lister import SECRET_FIELD_SELECTOR
from evenhand_operator.login import log_in
from evenhand_operator.objects import Json
from evenhand_operator.settings import Settings

_REQUEST_SECONDS, _CONNECT_SECONDS = 30.0, 5.0


async def watch(cache: Cache, settings: Settings) -> None:
    """Feeds the cache, in the loop of the caller, until cancelled. Raises whatever Kopf cannot cope with."""
    registry = _make_registry(cache, settings, asyncio.get_running_loop())
    stopping = threading.Event()

    async def run() -> None:
        try:
            await kopf.operator(
                registry=registry,
                settings=_make_kopf_settings(settings),
                standalone=True,
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
                stop_flag=stopping,
            )
        finally:
            stopping.set()  # else Kopf's thread that waits for it would wait for ever

    thread = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(run())))
    try:
        await asyncio.shield(thread)
    finally:
        stopping.set()
        await asyncio.wait([thread])
    raise RuntimeError("Kopf has ended although nobody told it to")


def _make_registry(cache: Cache, settings: Settings, loop: asyncio.AbstractEventLoop) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()
    tables: list[tuple[Resource, Any]] = [
        (TENANT_POLICIES, cache.policies),
        (ENGINE_POOLS, cache.pools),
        (PODS, cache.pods),
        (SECRETS, cache.secrets),
    ]
    if not settings.namespaces:
        tables.append((NAMESPACES, cache.namespaces))
    for resource, table in tables:
        _hand_over(registry, resource, table.observe, loop)

    @kopf.on.login(registry=registry)
    def _log_in(**_: Any) -> kopf.ConnectionInfo:
        return log_in()

    return registry


def _hand_over(
    registry: kopf.OperatorRegistry,
    resource: Resource,
    observe: Callable[[str | None, Json], None],
    loop: asyncio.AbstractEventLoop,
) -> None:
    group, _, version = resource.api_version.rpartition("/")

    @kopf.on.event(group, version, resource.plural, registry=registry, id=f"observe-{resource.plural}")
    async def _observe(event: Any, **_: Any) -> None:
        loop.call_soon_threadsafe(observe, event["type"], event["object"])


def _make_kopf_settings(settings: Settings) -> kopf.OperatorSettings:
    """Kopf as a plain watcher that never gives up."""
    kopf_settings = kopf.OperatorSettings()
    kopf_settings.posting.enabled = False
    kopf_settings.scanning.disabled = True
    kopf_settings.persistence.diffbase_storage = _NoDiffBase()
    kopf_settings.persistence.progress_storage = _NoProgress()
    kopf_settings.queueing.idle_timeout = 0.5  # a task per object that has just changed, not per object
    kopf_settings.networking.error_backoffs = _Backoffs()
    kopf_settings.networking.request_timeout = _REQUEST_SECONDS
    kopf_settings.networking.connect_timeout = _CONNECT_SECONDS
    kopf_settings.watching.connect_timeout = _CONNECT_SECONDS
    kopf_settings.watching.chunk_size = PAGE_SIZE
    kopf_settings.watching.field_selectors["v1", "secrets"] = SECRET_FIELD_SELECTOR
    if settings.pod_selector:
        kopf_settings.watching.label_selectors["v1", "pods"] = settings.pod_selector
    return kopf_settings


class _Backoffs(Iterable[float]):
    """Quick at first, since an API server that restarts is soon back; then for ever."""

    def __iter__(self) -> Iterator[float]:
        delay = 0.2
        while True:
            yield delay
            delay = min(delay * 1.5, 5.0)


class _NoDiffBase(kopf.DiffBaseStorage):
    """Kopf need not know what has changed: that would cost a deep copy of every object."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: Any) -> None:
        pass


class _NoProgress(kopf.ProgressStorage):
    """There are no handlers whose progress could be kept."""

    def fetch(self, *, key: Any, body: kopf.Body) -> None:
        return None

    def store(self, *, key: Any, record: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        pass

    def purge(self, *, key: Any, body: kopf.Body, patch: kopf.Patch) -> None:
        pass

    def touch(self, *, body: kopf.Body, patch: kopf.Patch, value: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence
