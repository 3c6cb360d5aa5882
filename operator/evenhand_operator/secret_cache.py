"""The Secrets that policies and pools name, and no others: what nobody refers to is forgotten as it arrives."""

from collections.abc import Callable, Iterable, Mapping

from evenhand_operator.objects import Json, Meta, ObjectKey, read_meta
from evenhand_policy.decode import decode
from evenhand_policy.errors import InvalidResourceError
from evenhand_policy.secret import Secret


class SecretCache:
    """Secrets by namespace and name. `changed` is called when one that is wanted appears, changes or goes, `gap` when
    the watch has begun anew, so that deletions may have been missed."""

    def __init__(self, changed: Callable[[], None], gap: Callable[[], None]) -> None:
        self._changed = changed
        self._gap = gap
        self._wanted: frozenset[ObjectKey] = frozenset()
        self._secrets: dict[ObjectKey, Secret | None] = {}  # None: known not to be there
        self._versions: dict[ObjectKey, int] = {}

    @property
    def found(self) -> Mapping[ObjectKey, Secret]:
        """Those that are wanted and exist."""
        return {key: secret for key, secret in self._secrets.items() if secret is not None}

    def want(self, keys: Iterable[ObjectKey]) -> set[ObjectKey]:
        """From now on exactly these matter; returns those of which nothing is known yet."""
        self._wanted = frozenset(keys)
        for key in self._secrets.keys() - self._wanted:
            del self._secrets[key]
            self._versions.pop(key, None)
        return set(self._wanted - self._secrets.keys())

    def observe(self, event: str | None, obj: Json) -> None:
        """Take in an event of the watch; `event` is None for what Kopf has listed."""
        if event is None:
            self._gap()
        meta = read_meta(obj)
        if event == "DELETED" or meta.deletion_timestamp is not None:
            self.set_absent(meta.key, meta.version)
        else:
            self.take(obj)

    def take(self, obj: Json) -> None:
        """Take in a Secret that was read or listed."""
        meta = read_meta(obj)
        if meta.key in self._wanted and meta.version >= self._versions.get(meta.key, 0):
            self._set(meta.key, _read_secret(meta, obj), meta.version)

    def set_absent(self, key: ObjectKey, version: int) -> None:
        """At that resource version there was no such Secret."""
        if key in self._wanted and version >= self._versions.get(key, 0):
            self._set(key, None, version)

    def keep_only(self, keys: Iterable[ObjectKey], version: int) -> None:
        """What is wanted and a list of that version lacks does not exist, unless it is newer than the list."""
        for key in self._wanted - set(keys):
            self.set_absent(key, version)

    def _set(self, key: ObjectKey, secret: Secret | None, version: int) -> None:
        before = self._secrets.get(key)
        self._secrets[key] = secret
        self._versions[key] = version
        if secret != before:
            self._changed()


def _read_secret(meta: Meta, obj: Json) -> Secret | None:
    """Only what a key can be in; items of a list lack their kind."""
    spec = {"apiVersion": "v1", "kind": "Secret", "metadata": obj["metadata"], "data": obj.get("data") or {}}
    try:
        return decode(spec, Secret)
    except InvalidResourceError:
        return None
