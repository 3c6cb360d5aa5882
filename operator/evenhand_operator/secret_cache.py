"""Secrets that hold keys: all of our own type, and of other types those that policies and pools name.

What is of another type and named by nobody is forgotten as it arrives.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.objects import Json, Meta, ObjectKey, read_meta
from evenhand_operator.tombstones import Tombstones
from evenhand_policy.decode import decode
from evenhand_policy.errors import InvalidResourceError
from evenhand_policy.secret import API_KEYS_TYPE, Secret


class SecretCache:
    """Secrets by namespace and name. `changed` is called when one that is wanted appears, changes or goes."""

    def __init__(self, changed: Callable[[], None], clock: Clock = SYSTEM_CLOCK) -> None:
        self._changed = changed
        self._wanted: frozenset[ObjectKey] = frozenset()
        self._secrets: dict[ObjectKey, Secret] = {}
        self._versions: dict[ObjectKey, int] = {}
        self._absent: set[ObjectKey] = set()  # of those that are wanted, which are known not to be there
        self._gone = Tombstones[ObjectKey](clock.monotonic)

    @property
    def found(self) -> Mapping[ObjectKey, Secret]:
        """Those that exist, as they are now."""
        return dict(self._secrets)

    def want(self, keys: Iterable[ObjectKey]) -> set[ObjectKey]:
        """From now on exactly these matter; returns those of which nothing is known yet."""
        self._wanted = frozenset(keys)
        self._absent &= self._wanted
        for key in self._secrets.keys() - self._wanted:
            if not _is_ours(self._secrets[key]):
                del self._secrets[key], self._versions[key]
        return set(self._wanted - self._secrets.keys() - self._absent)

    def namespaces_of_others(self) -> set[str]:
        """Namespaces in which a Secret is wanted that is not of our type, or not there."""
        missing_or_other = (key for key in self._wanted if not _is_ours(self._secrets.get(key)))
        return {namespace for namespace, _ in missing_or_other}

    def observe(self, event: str, obj: Json) -> None:
        """Take in an event of the watch."""
        if event != "DELETED":
            self.take(obj)
        elif self._matters(obj, meta := read_meta(obj)):
            self._remove(meta.key, meta.version)

    def take(self, obj: Json) -> Meta:
        """Take in a Secret that was read or listed; one that is being deleted is gone, its keys are good no more."""
        meta = read_meta(obj)
        if self._matters(obj, meta):
            secret = _read_secret(obj) if meta.deletion_timestamp is None else None
            if secret is None:
                self._remove(meta.key, meta.version)
            else:
                self._set(meta, secret)
        return meta

    def _matters(self, obj: Json, meta: Meta) -> bool:
        return meta.key in self._wanted or obj.get("type") == API_KEYS_TYPE

    def set_absent(self, key: ObjectKey, version: int) -> None:
        """At that resource version there was no such Secret."""
        self._remove(key, version)

    def keep_only(self, present: Iterable[Meta], version: int, namespace: str | None, *, ours: bool) -> None:
        """Drop what a list of that version lacks, unless it is newer.

        Args:
            namespace: of which the list was; None: of all.
            ours: whether it was of those of our type, or of all others.
        """
        keys = {meta.key for meta in present}
        for key in self._secrets.keys() - keys:
            if namespace in (None, key[0]) and _is_ours(self._secrets[key]) is ours:
                self._remove(key, version)
        if not ours:
            missing = {key for key in self._wanted - self._secrets.keys() if namespace in (None, key[0])}
            self._absent |= missing

    def _set(self, meta: Meta, secret: Secret) -> None:
        if meta.version < self._versions.get(meta.key, 0) or meta.version <= self._gone.version(meta.key):
            return
        before = self._secrets.get(meta.key)
        self._secrets[meta.key], self._versions[meta.key] = secret, meta.version
        self._absent.discard(meta.key)
        if secret != before and meta.key in self._wanted:
            self._changed()

    def _remove(self, key: ObjectKey, version: int) -> None:
        if version < self._versions.get(key, 0):
            return
        self._gone.bury(key, version)
        if key in self._wanted:
            self._absent.add(key)
        if key in self._secrets:
            del self._secrets[key], self._versions[key]
            if key in self._wanted:
                self._changed()


class SecretFeed(NamedTuple):
    """Where a Reflector of Secrets puts them: of our own type, or of all others."""

    secrets: SecretCache
    ours: bool

    def take(self, obj: Json) -> Meta:
        return self.secrets.take(obj)

    def observe(self, event: str, obj: Json) -> None:
        self.secrets.observe(event, obj)

    def keep_only(self, present: Iterable[Meta], version: int, namespace: str | None) -> None:
        self.secrets.keep_only(present, version, namespace, ours=self.ours)


def _is_ours(secret: Secret | None) -> bool:
    return secret is not None and secret.type == API_KEYS_TYPE


def _read_secret(obj: Json) -> Secret | None:
    """Only what a key can be in; items of a list lack their kind."""
    spec = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": obj["metadata"],
        "type": obj.get("type") or "Opaque",
        "data": obj.get("data") or {},
    }
    try:
        return decode(spec, Secret)
    except InvalidResourceError:
        return None
