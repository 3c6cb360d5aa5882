"""A leader's term on an API server that remembers what was written."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Any

from evenhand_operator.cache import Cache
from evenhand_operator.clock import SYSTEM_CLOCK
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.kube import ApiError
from evenhand_operator.objects import ObjectKey
from evenhand_operator.settings import Settings
from evenhand_operator.signals import Signals
from evenhand_operator.term import Surroundings, Term
from harness.builders import NAMESPACE, make_pod, make_policy, make_pool, make_secret

Json = dict[str, Any]

SETTINGS = Settings(quiet_seconds=0.005, longest_wait_seconds=0.02, settle_seconds=0.01)


class TermApi:
    """The parts of KubeClient, Lister and Lease that a term uses. `before_read` is called before Secrets are read."""

    def __init__(self, changes: Any, key: Any) -> None:
        self.signals = Signals(SETTINGS)
        self.cache = Cache(self.signals)
        self.secrets: dict[ObjectKey, Json] = {}
        self.written: list[Json] = []
        self.told: list[Json] = []  # by another field manager
        self.bootstrap: dict[str, Json] = {}
        self.stored: list[str] = []  # of these, what was written, by the ends of the names
        self.key = SimpleNamespace(current=key, trusted=(key.public_key(),), refresh=None)
        self._objects: dict[str, Json] = {}
        self.before_read: Callable[[], None] = lambda: None
        self.fail_writes = 0
        self.epoch = 1
        self.installation = "evenhand-system/evenhand-operator"
        self.term: Term | None = None
        self.caught_up = asyncio.Event()
        self._versions = iter(range(1000, 10**6))
        self._changes = changes

    async def get(self, _: object, namespace: str, name: str) -> Json:
        if name not in self.bootstrap:
            raise ApiError(404, "not found")
        return self.bootstrap[name]

    async def apply(self, resource: Any, obj: Json, subresource: str | None = None, **told: str) -> Json:
        if told:
            self.told.append(obj)
            return obj
        if subresource != "status":
            return await self.create(resource, obj)
        if self.fail_writes:
            self.fail_writes -= 1
            raise ApiError(503, "away")
        table = self.cache.policies if resource.kind == "TenantPolicy" else self.cache.pools
        stored = self._objects[obj["metadata"]["uid"]]
        stored["status"] = obj["status"]
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        self.written.append(obj)
        assert table.get(obj["metadata"]["uid"])
        self._changes.notify()
        return stored

    async def replace(self, resource: Any, obj: Json) -> Json:
        return await self.create(resource, obj)

    async def create(self, resource: Any, obj: Json) -> Json:
        if resource.kind != "Secret":
            return obj
        obj["metadata"]["resourceVersion"] = str(next(self._versions))
        self.bootstrap[obj["metadata"]["name"]] = obj
        self.stored.append(obj["metadata"]["name"].removeprefix("evenhand-bootstrap-default-"))
        return obj

    async def provide_secrets(self, keys: Iterable[ObjectKey]) -> None:
        unknown = self.cache.secrets.want(keys)
        self.before_read()
        await asyncio.sleep(0)
        for key in unknown:
            if key in self.secrets:
                self.cache.secrets.take(self.secrets[key])
            else:
                self.cache.secrets.set_absent(key, 0)

    async def raise_epoch(self, at_least: int) -> int:
        self.epoch = max(self.epoch + 1, at_least)
        return self.epoch

    def store(self, kind: str, name: str, **spec: Any) -> None:
        """Store an object, and let the watch tell of it."""
        make = make_policy if kind == "TenantPolicy" else make_pool
        obj = make(name, meta=self._meta(name), **spec)
        self._objects[obj["metadata"]["uid"]] = obj
        (self.cache.policies if kind == "TenantPolicy" else self.cache.pools).observe("ADDED", obj)

    def edit(self, name: str, **spec: Any) -> None:
        """Change the spec of a pool."""
        [obj] = [obj for obj in self._objects.values() if obj["metadata"]["name"] == name]
        obj["spec"] |= spec
        obj["metadata"]["generation"] += 1
        obj["metadata"]["resourceVersion"] = str(next(self._versions))
        self.cache.pools.observe("MODIFIED", obj)

    def delete(self, name: str) -> None:
        """Delete a pool."""
        [obj] = [obj for obj in self._objects.values() if obj["metadata"]["name"] == name]
        self.cache.pools.observe("DELETED", obj)

    def delete_pod(self, name: str) -> None:
        """Delete a pod."""
        self.cache.pods.observe("DELETED", make_pod(name, version=next(self._versions)))

    def store_pod(self, name: str, url: str) -> None:
        """A ready engine pod, of which the watch tells."""
        self.cache.pods.observe("ADDED", make_pod(name, url, version=next(self._versions)))

    def condition(self, name: str, kind: str) -> tuple[str, str]:
        """Status and reason as they are."""
        [obj] = [obj for obj in self._objects.values() if obj["metadata"]["name"] == name]
        rows = {row["type"]: (str(row["status"]), row["reason"]) for row in obj.get("status", {}).get("conditions", [])}
        return rows.get(kind, ("", ""))

    def store_secret(self, name: str) -> None:
        """A Secret that nobody has been told of."""
        key = f"a-key-that-nobody-can-guess-{name}"
        self.secrets[NAMESPACE, name] = make_secret(name, key, version=next(self._versions))

    def _meta(self, name: str) -> Json:
        """Arguments of `make_meta`: another object than before of that name."""
        version = next(self._versions)
        return {"version": version, "uid": f"uid-{name}-{version}"}

    def accepted(self, name: str) -> list[str]:
        """Reasons of the condition Accepted that were written of an object, in order."""
        return [
            condition["reason"]
            for obj in self.written
            if obj["metadata"]["name"] == name
            for condition in obj["status"]["conditions"]
            if condition["type"] == "Accepted"
        ]


@contextlib.asynccontextmanager
async def term(api: TermApi, client: EngineClient | None = None, settings: Settings = SETTINGS) -> AsyncIterator[None]:
    """While it is entered, a replica leads."""
    issuer, told = SimpleNamespace(issuer=None), asyncio.Event()
    parts: Any = (settings, "c1", api.cache, api.signals, api, client, api.key, api, api, issuer, told, SYSTEM_CLOCK)
    around = Surroundings(*parts)
    try:
        async with asyncio.TaskGroup() as tasks:
            api.term = Term(around, tasks)
            yield
            raise _Over
    except* _Over:
        pass


class _Over(Exception):
    """Ends a term, as the loss of the Lease does."""
