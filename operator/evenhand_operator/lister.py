"""Lister: lists everything and corrects the cache by it: at the start, after every gap of the watch, and periodically."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from evenhand_operator import metrics
from evenhand_operator.cache import Cache, Table
from evenhand_operator.debounce import Debounce
from evenhand_operator.kube import (
    ENGINE_POOLS,
    NAMESPACES,
    PODS,
    SECRETS,
    TENANT_POLICIES,
    ApiError,
    KubeClient,
    Listing,
    Resource,
)
from evenhand_operator.objects import ObjectKey, read_meta
from evenhand_operator.secret_references import referenced_secrets
from evenhand_operator.settings import Settings

log = logging.getLogger(__name__)

# Secrets of these types are never named by a policy, and some are large
_IGNORED_SECRET_TYPES = (
    "helm.sh/release.v1",
    "kubernetes.io/service-account-token",
    "kubernetes.io/dockerconfigjson",
    "kubernetes.io/tls",
    "evenhand.dev/bootstrap",
)
SECRET_FIELD_SELECTOR = ",".join(f"type!={each}" for each in _IGNORED_SECRET_TYPES)
_GAP_QUIET_SECONDS, _GAP_LONGEST_SECONDS = 0.5, 20.0  # thousands of objects take Kopf some seconds
_SECOND_LOOK_SECONDS = 30.0
_MAX_READS = 16


class Lister:
    """Owns the time of the next list.

    Attributes:
        caught_up: set once everything was listed after the watch had begun, or half a minute after the start.
    """

    def __init__(self, kube: KubeClient, cache: Cache, settings: Settings) -> None:
        self._kube = kube
        self._cache = cache
        self._settings = settings
        self.caught_up = asyncio.Event()
        self._gap = Debounce(_GAP_QUIET_SECONDS, _GAP_LONGEST_SECONDS)

    def gap_seen(self) -> None:
        """The watch has begun anew: list as soon as that is over."""
        self._gap.signal()

    async def run(self) -> None:
        """List after every gap, and periodically; a while after the start and every gap once more, since Kopf says
        nothing of a kind of which it finds no object any more."""
        pause = _SECOND_LOOK_SECONDS
        while True:
            is_gap = await self._gap.wait(timeout=pause) is not None
            await self.list_all()
            self.caught_up.set()
            pause = _SECOND_LOOK_SECONDS if is_gap else self._settings.relist_seconds

    async def list_all(self) -> None:
        """Returns once everything has been listed, however long the API server is away."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(ApiError),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            before_sleep=_log_failure,
        )
        await retrying(self._list_all)
        metrics.LAST_LIST.set(time.time())

    async def read_secrets(self, keys: Iterable[ObjectKey]) -> None:
        """Read Secrets that have just become wanted. Raises ApiError."""
        slots = asyncio.Semaphore(_MAX_READS)

        async def read(key: ObjectKey) -> None:
            async with slots:
                try:
                    self._cache.secrets.take(await self._kube.get(SECRETS, *key))
                except ApiError as error:
                    if error.status != 404:
                        raise
                    self._cache.secrets.set_absent(key, 0)

        await _all(read(key) for key in keys)

    async def _list_all(self) -> None:
        cache = self._cache
        tables: list[tuple[Resource, Table[Any], dict[str, str]]] = [
            (TENANT_POLICIES, cache.policies, {}),
            (ENGINE_POOLS, cache.pools, {}),
            (PODS, cache.pods, {"labelSelector": self._settings.pod_selector}),
        ]
        if not self._settings.namespaces:
            tables.append((NAMESPACES, cache.namespaces, {}))
        await _all(self._list(*each) for each in tables)
        cache.secrets.want(referenced_secrets(cache.policies, cache.pools))
        await self._list_secrets()

    async def _list(self, resource: Resource, table: Table[Any], parameters: dict[str, str]) -> None:
        uids: list[str] = []
        versions: list[int] = []
        async for page in self._pages(resource, parameters):
            for obj in page.items:
                table.take(obj)
                uids.append(obj["metadata"]["uid"])
            versions.append(page.version)
        table.keep_only(uids, min(versions))

    async def _list_secrets(self) -> None:
        keys: list[ObjectKey] = []
        versions: list[int] = []
        async for page in self._pages(SECRETS, {"fieldSelector": SECRET_FIELD_SELECTOR}):
            for obj in page.items:
                self._cache.secrets.take(obj)
                keys.append(read_meta(obj).key)
            versions.append(page.version)
        self._cache.secrets.keep_only(keys, min(versions))

    async def _pages(self, resource: Resource, parameters: dict[str, str]) -> AsyncIterator[Listing]:
        given = {name: value for name, value in parameters.items() if value}
        for namespace in self._settings.namespaces or (None,):
            async for page in self._kube.list_pages(resource, namespace, **given):
                yield page


async def _all(coroutines: Iterable[Any]) -> None:
    """Run concurrently; the first ApiError ends the others and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in coroutines:
                tasks.create_task(coroutine)
    except ExceptionGroup as group:
        for error in group.exceptions:
            if isinstance(error, ApiError):
                raise error from None
        raise


def _log_failure(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    missing_crds = isinstance(error, ApiError) and error.status == 404
    advice = "; are the CustomResourceDefinitions installed (kubectl apply -f crds/)?" if missing_crds else ""
    log.warning("cannot list: %s%s", error, advice)
