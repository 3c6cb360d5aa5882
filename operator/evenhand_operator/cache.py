"""What the operator knows of the cluster: fed by Reflectors, and for policies and pools by Kopf; read by everybody else.

Kopf's watch alone is not enough: after a gap, objects that were deleted meanwhile would stay for ever. So policies and
pools are listed after every sign of a gap, and from time to time; what a list lacks is dropped.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import msgspec

from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.objects import EnginePod, Json, Meta, ObjectKey, read_meta, read_pod
from evenhand_operator.observed import ObservedPolicy, ObservedPool, read_policy, read_pool
from evenhand_operator.secret_cache import SecretCache
from evenhand_operator.tombstones import Tombstones
from evenhand_policy.pool import EnginePoolSpec


class Keyed(Protocol):
    """Anything that is cached."""

    @property
    def key(self) -> ObjectKey: ...


T = TypeVar("T", bound=Keyed)


class _Row(NamedTuple, Generic[T]):
    value: T
    version: int


class Table(Generic[T]):
    """Objects of one kind by uid.

    Args:
        read: makes a value of an object; None: the object does not count.
        changed: called with the value before and after, None where there is none; never for equal values.
        gap: called when the watch has begun anew, so that deletions may have been missed.
    """

    def __init__(
        self,
        read: Callable[[Json], T | None],
        changed: Callable[[T | None, T | None], None],
        gap: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._read = read
        self._changed = changed
        self._gap = gap
        self._rows: dict[str, _Row[T]] = {}
        self._gone = Tombstones[str](clock.monotonic)
        self._listed: dict[str | None, int] = {}  # version of the latest list of each namespace, or of all (None)

    def __iter__(self) -> Iterator[T]:
        return (row.value for row in self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, uid: str) -> T | None:
        """The object of that uid."""
        row = self._rows.get(uid)
        return row.value if row else None

    def observe(self, event: str | None, obj: Json) -> None:
        """Take in an event of the watch; `event` is None for what Kopf has listed.

        Kopf lists at its start and whenever it lost track, and does not tell what is missing from its list.
        """
        if event is None:
            self._gap()
        meta = read_meta(obj)
        if event != "DELETED":
            self._take(meta, obj)
            return
        row = self._rows.get(meta.uid)
        if row is None or meta.version >= row.version:
            self._gone.bury(meta.uid, meta.version)
            self._remove(meta.uid)

    def take(self, obj: Json) -> Meta:
        """Take in an object of a list."""
        meta = read_meta(obj)
        self._take(meta, obj)
        return meta

    def take_written(self, obj: Json) -> None:
        """Take in the answer to a write of our own, ahead of its event; the object may be gone by now."""
        meta = read_meta(obj)
        if meta.uid in self._rows:
            self._take(meta, obj)

    def keep_only(self, present: Iterable[Meta], version: int, namespace: str | None = None) -> None:
        """Drop what a list of that version, of all namespaces or of one, lacks, unless it is newer than the list."""
        for uid in self._rows.keys() - {meta.uid for meta in present}:
            row = self._rows[uid]
            if row.version <= version and namespace in (None, row.value.key[0]):
                self._remove(uid)
        self._listed[namespace] = max(version, self._listed.get(namespace, -1))

    def _take(self, meta: Meta, obj: Json) -> None:
        row = self._rows.get(meta.uid)
        if meta.version <= (self._last_seen_gone(meta) if row is None else row.version):
            return
        value = self._read(obj)
        if value is None:
            self._gone.bury(meta.uid, meta.version)
            self._remove(meta.uid)
            return
        self._rows[meta.uid] = _Row(value, meta.version)
        before = row.value if row else None
        if value != before:
            self._changed(before, value)

    def _last_seen_gone(self, meta: Meta) -> int:
        """The latest version at which an object that is not known was gone: what a list lacked is gone since then."""
        lists = (self._listed.get(namespace, -1) for namespace in (None, meta.namespace))
        return max(self._gone.version(meta.uid), *lists)

    def _remove(self, uid: str) -> None:
        if row := self._rows.pop(uid, None):
            self._changed(row.value, None)


class Notices(Protocol):
    """Who wants to know what has changed."""

    def documents_changed(self) -> None:
        """What decides about documents is another."""

    def pods_changed(self) -> None:
        """Which pods are ready is another."""

    def statuses_changed(self) -> None:
        """A status is another, or of an object that is new."""

    def gap_seen(self) -> None:
        """Events may be missing."""


class ObservedNamespace(msgspec.Struct, frozen=True):
    """A namespace, of which only the labels matter."""

    key: ObjectKey
    labels: dict[str, str]


class Cache:
    """All tables.

    Attributes:
        policies, pools, pods, namespaces: by uid.
        secrets: of our own type, and those that a policy or a pool names.
        unreadable: served namespaces that we may not read; what is known of them counts for nothing.
    """

    def __init__(self, notices: Notices, clock: Clock = SYSTEM_CLOCK) -> None:
        self._notices = notices
        self.unreadable: frozenset[str] = frozenset()
        self.policies = Table(read_policy, self._resource_changed, notices.gap_seen, clock)
        self.pools = Table(read_pool, self._resource_changed, notices.gap_seen, clock)
        self.pods = Table(read_pod, self._pod_changed, notices.gap_seen, clock)
        self.namespaces = Table(_read_namespace, self._namespace_changed, notices.gap_seen, clock)
        self.secrets = SecretCache(notices.documents_changed, clock)

    def set_unreadable(self, namespaces: Iterable[str]) -> None:
        """These namespaces cannot be read, all others can."""
        if self.unreadable != (now := frozenset(namespaces)):
            self.unreadable = now
            self._notices.documents_changed()

    def readable_policies(self) -> tuple[ObservedPolicy, ...]:
        """Policies of namespaces that can be read."""
        return tuple(policy for policy in self.policies if policy.key[0] not in self.unreadable)

    def readable_pools(self) -> tuple[ObservedPool, ...]:
        """Pools of namespaces that can be read: of another one it is not known which policies it has."""
        return tuple(pool for pool in self.pools if pool.key[0] not in self.unreadable)

    def namespace_labels(self) -> dict[str, dict[str, str]]:
        """Labels of every namespace by name."""
        return {namespace.key[1]: namespace.labels for namespace in self.namespaces}

    def _resource_changed(
        self, before: ObservedPolicy | ObservedPool | None, after: ObservedPolicy | ObservedPool | None
    ) -> None:
        if before is None or after is None or before.request != after.request:
            self._notices.documents_changed()
        else:
            self._notices.statuses_changed()

    def _pod_changed(self, before: EnginePod | None, after: EnginePod | None) -> None:
        self._notices.pods_changed()

    def _namespace_changed(self, before: ObservedNamespace | None, after: ObservedNamespace | None) -> None:
        if any(pool.pool is not None and _selects_namespaces(pool.pool.spec) for pool in self.pools):
            self._notices.documents_changed()


def _selects_namespaces(spec: EnginePoolSpec) -> bool:
    return bool(spec.allowed_namespaces.selector or spec.grants)


def _read_namespace(obj: Json) -> ObservedNamespace:
    meta = read_meta(obj)
    return ObservedNamespace(meta.key, meta.labels)
