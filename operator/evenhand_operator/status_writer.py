"""Writes statuses: by server-side apply, only where one differs from what is there, a bounded number at a time."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from evenhand_operator.cache import Cache
from evenhand_operator.events import EventRecorder, transitions
from evenhand_operator.kube import ENGINE_POOLS, TENANT_POLICIES, ApiError, KubeClient
from evenhand_operator.objects import Json
from evenhand_operator.observed import ObservedPolicy, ObservedPool
from evenhand_policy.status import EnginePoolStatus, TenantPolicyStatus

log = logging.getLogger(__name__)

_MAX_WRITES = 24  # in flight; more do not go faster


class StatusChange(NamedTuple):
    """A status that should become another one."""

    observed: ObservedPolicy | ObservedPool
    status: TenantPolicyStatus | EnginePoolStatus

    @property
    def is_needed(self) -> bool:
        """Whether it differs from what is there."""
        return self.status != self.observed.status


class StatusWriter:
    """Owns no state: what is there is in the cache, which takes in the answer to every write."""

    def __init__(self, kube: KubeClient, cache: Cache, events: EventRecorder) -> None:
        self._kube = kube
        self._cache = cache
        self._events = events

    async def write(self, changes: list[StatusChange]) -> int:
        """Write all; returns how many failed and should be tried again."""
        slots = asyncio.Semaphore(_MAX_WRITES)

        async def write(change: StatusChange) -> bool:
            async with slots:
                return await self._write(change)

        return sum(not succeeded for succeeded in await asyncio.gather(*map(write, changes)))

    async def _write(self, change: StatusChange) -> bool:
        observed = change.observed
        resource = TENANT_POLICIES if isinstance(observed, ObservedPolicy) else ENGINE_POOLS
        table = self._cache.policies if isinstance(observed, ObservedPolicy) else self._cache.pools
        namespace, name = observed.key
        metadata = {"name": name, "namespace": namespace, "uid": observed.uid}
        obj = {"metadata": metadata, "status": _without_none(msgspec.to_builtins(change.status))}
        try:
            table.take_written(await self._kube.apply(resource, obj, "status"))
        except ApiError as error:
            if error.status in (404, 409):
                return True  # gone, or another object of that name: the watch will tell
            log.warning("cannot write the status of %s: %s", observed.reference, error)
            return False
        for transition in transitions(observed.status.conditions, change.status.conditions):
            self._events.record(observed, transition)
        return True


def _without_none(value: Any) -> Json | Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
