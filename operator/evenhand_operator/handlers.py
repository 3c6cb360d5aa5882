"""Kopf's part: it watches policies and pools, and hands every event to the cache. It writes nothing: no annotations, no finalizers.

It has a thread and a loop of its own. For each object that is new to it, Kopf needs a turn of the loop, so in a loop that
also writes thousands of statuses its first list takes minutes, and changes are not seen before it has ended.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import kopf

from evenhand_operator.cache import Cache
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.kube import PAGE_SIZE
from evenhand_operator.login import log_in
from evenhand_operator.objects import Json
from evenhand_operator.resources import ENGINE_POOLS, TENANT_POLICIES, Resource
from evenhand_operator.settings import Settings

log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 10.0
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 1.0
_REQUEST_SECONDS, _CONNECT_SECONDS = 30.0, 5.0
_COURTESY_SECONDS = 0.0005


async def watch(
    cache: Cache,
    settings: Settings,
    readable_namespaces: Callable[[], tuple[str, ...]],
    credentials: Callable[[], kopf.ConnectionInfo],
    clock: Clock = SYSTEM_CLOCK,
) -> None:
    """Feeds the cache, in the loop of the caller, until cancelled.

    Kopf ends where one of its requests is refused: a namespace that was deleted (403), a list that took so long that the
    API server has forgotten its version (410). Then it is started anew, with the namespaces that can be read; and so it is
    where the credentials were read again, since Kopf would ask by an authority that was replaced for ever.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        namespaces, known, started_at = readable_namespaces(), credentials(), clock.monotonic()
        if namespaces or not settings.namespaces:
            await _run_kopf(
                cache,
                settings,
                namespaces,
                lambda: readable_namespaces() != namespaces or credentials() is not known,  # noqa: B023
            )
        await asyncio.sleep(pause)
        is_stable = clock.monotonic() - started_at > _LONGEST_PAUSE_SECONDS
        pause = _FIRST_PAUSE_SECONDS if is_stable else min(2 * pause, _LONGEST_PAUSE_SECONDS)


async def _run_kopf(
    cache: Cache, settings: Settings, namespaces: Collection[str], is_outdated: Callable[[], bool]
) -> None:
    """Returns when Kopf has ended, by itself or because it should look elsewhere."""
    stopping, ending = threading.Event(), asyncio.Event()
    registry = _make_registry(cache, asyncio.get_running_loop(), ending)

    async def run() -> None:
        reaper = asyncio.create_task(_reap(ending, asyncio.current_task()))
        try:
            await kopf.operator(
                registry=registry,
                settings=_make_kopf_settings(),
                standalone=True,
                clusterwide=not settings.namespaces,
                namespaces=namespaces,
                stop_flag=stopping,
            )
        finally:
            stopping.set()  # else Kopf's thread that waits for it would wait for ever
            reaper.cancel()

    thread = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(run())))
    try:
        while not thread.done() and not is_outdated():
            await asyncio.wait([thread], timeout=_LOOK_SECONDS)
    finally:
        stopping.set()
        await asyncio.wait([thread])
    if (error := thread.exception()) is not None:
        log.warning("Kopf has ended, and is started anew: %s: %s", type(error).__name__, error)


async def _reap(ending: asyncio.Event, main: asyncio.Task[Any] | None) -> None:
    """Cancels what is left when Kopf ends, again and again.

    Kopf cancels each task once, and waits for it; a watch that is being connected takes that for a pause, and goes on. So an
    API server that restarts while Kopf ends would keep it from ending, and from being started anew, for ever.
    """
    await ending.wait()
    while True:
        await asyncio.sleep(_GRACE_SECONDS)
        for task in asyncio.all_tasks() - {asyncio.current_task(), main}:
            task.cancel()


def _make_registry(cache: Cache, loop: asyncio.AbstractEventLoop, ending: asyncio.Event) -> kopf.OperatorRegistry:
    """What Kopf is to do: hand over events, log in as we do, and say when it is `ending`."""
    registry = kopf.OperatorRegistry()
    _hand_over(registry, TENANT_POLICIES, cache.policies.observe, loop)
    _hand_over(registry, ENGINE_POOLS, cache.pools.observe, loop)

    @kopf.on.login(registry=registry)
    def _log_in(**_: Any) -> kopf.ConnectionInfo:
        return log_in()

    @kopf.on.cleanup(registry=registry)
    async def _say_that_it_ends(**_: Any) -> None:
        ending.set()

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
        if event["type"] is None:  # of a list, which may be long: the others in this process, who push, go first
            time.sleep(_COURTESY_SECONDS)


def _make_kopf_settings() -> kopf.OperatorSettings:
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
