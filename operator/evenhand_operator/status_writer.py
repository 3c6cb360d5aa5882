"""Writes statuses: by server-side apply, only where one differs from what is there, a bounded number at a time."""

import asyncio
import logging
import re
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import msgspec

from evenhand_operator.cache import Cache
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.events import EventRecorder, transitions
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.objects import Json
from evenhand_operator.observed import ObservedPolicy, ObservedPool
from evenhand_operator.resources import ENGINE_POOLS, TENANT_POLICIES, Resource
from evenhand_policy.status import EnginePoolStatus, TenantPolicyStatus

log = logging.getLogger(__name__)

_MAX_WRITES = 24  # in flight; more do not go faster
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 300.0

_UNDECLARED = re.compile(r"\.status\.(\S+): field not declared in schema")

_Status = TenantPolicyStatus | EnginePoolStatus


class StatusChange(NamedTuple):
    """A status that should become another one."""

    observed: ObservedPolicy | ObservedPool
    status: _Status

    @property
    def is_needed(self) -> bool:
        """Whether it differs from what is there."""
        return self.status != self.observed.status


class _Setback(NamedTuple):
    """A write that failed: of which generation, the monotonic time of the next try, and how long that is to wait."""

    generation: int
    until: float
    pause: float


class StatusWriter:
    """Remembers which writes failed, each of which waits by itself, and what became of those that an older CRD cut.

    What is there is in the cache, which takes in the answer to every write.
    """

    def __init__(self, kube: KubeClient, cache: Cache, events: EventRecorder, clock: Clock = SYSTEM_CLOCK) -> None:
        self._kube = kube
        self._cache = cache
        self._events = events
        self._clock = clock
        self._undeclared: dict[str, set[tuple[str, ...]]] = {}
        self._setbacks: dict[str, _Setback] = {}
        self._cut: dict[str, tuple[_Status, _Status]] = {}

    def is_due(self, change: StatusChange) -> bool:
        """Whether it is worth a write now: not what has just failed, nor what the API server would store as it is."""
        observed = change.observed
        if not change.is_needed or self._cut.get(observed.uid) == (change.status, observed.status):
            return False
        setback = self._setbacks.get(observed.uid)
        return setback is None or setback.generation != observed.generation or setback.until <= self._clock.monotonic()

    async def write(self, changes: list[StatusChange]) -> int:
        """Write all; returns how many failed. Each of those is due again after a pause of its own."""
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
        status = _without_none(msgspec.to_builtins(change.status))
        try:
            table.take_written(await self._apply(resource, metadata, status))
        except ApiError as error:
            if error.status in (404, 409):
                self._forget(observed.uid)
                return True  # gone, or another object of that name: the watch will tell
            log.warning("cannot write the status of %s: %s", observed.reference, error)
            self._put_off(observed, error)
            return False
        self._forget(observed.uid)
        self._remember_cut(change, table.get(observed.uid))
        for transition in transitions(observed.status.conditions, change.status.conditions):
            self._events.record(observed, transition)
        return True

    async def _apply(self, resource: Resource, metadata: Json, status: Json) -> Json:
        """Without the members that a CRD older than the operator does not declare: it refuses them all at first."""
        undeclared = self._undeclared.setdefault(resource.kind, set())
        while True:
            try:
                obj = {"metadata": metadata, "status": _without(status, (), undeclared)}
                return await self._kube.apply(resource, obj, "status")
            except ApiError as error:
                found = {_members(path) for path in _UNDECLARED.findall(str(error))} - undeclared
                if not found:
                    raise
                names = sorted(".".join(path) for path in found)
                log.warning("the CRD of %s is older than the operator and lacks %s", resource.kind, ", ".join(names))
                undeclared |= found

    def _forget(self, uid: str) -> None:
        self._setbacks.pop(uid, None)
        self._cut.pop(uid, None)

    def _put_off(self, observed: ObservedPolicy | ObservedPool, error: ApiError) -> None:
        """What may pass is soon tried again, what another try does not heal ever later."""
        before = self._setbacks.get(observed.uid)
        pause = _FIRST_PAUSE_SECONDS
        if not error.is_transient and before is not None and before.generation == observed.generation:
            pause = min(2 * before.pause, _LONGEST_PAUSE_SECONDS)
        pause = max(pause, error.retry_after)
        self._setbacks[observed.uid] = _Setback(observed.generation, self._clock.monotonic() + pause, pause)

    def _remember_cut(self, change: StatusChange, stored: ObservedPolicy | ObservedPool | None) -> None:
        """A CRD that is older than the operator drops what it does not know; writing it again would change nothing."""
        if stored is not None and stored.status != change.status and stored.generation == change.observed.generation:
            self._cut[stored.uid] = (change.status, stored.status)


def _members(path: str) -> tuple[str, ...]:
    """Names on the way to a member, without the keys of list items."""
    return tuple(re.sub(r"\[[^\]]*\]", "", path).split("."))


def _without(value: Any, above: tuple[str, ...], members: Set[tuple[str, ...]]) -> Any:
    if isinstance(value, dict):
        return {
            name: _without(item, (*above, name), members)
            for name, item in value.items()
            if (*above, name) not in members
        }
    return [_without(item, above, members) for item in value] if isinstance(value, list) else value


def _without_none(value: Any) -> Json | Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
