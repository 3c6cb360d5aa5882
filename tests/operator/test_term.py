"""A leader's term, with an API server that remembers what was written and pods that are none."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from evenhand_operator.cache import Cache
from evenhand_operator.kube import ApiError
from evenhand_operator.objects import ObjectKey
from evenhand_operator.settings import Settings
from evenhand_operator.term import Surroundings, Term

Json = dict[str, Any]


class Api:
    """The parts of KubeClient and Lister that a term uses. `before_read` is called before Secrets are read."""

    def __init__(self, changes: Any) -> None:
        self.cache = Cache(self)
        self.secrets: dict[ObjectKey, Json] = {}
        self.written: list[Json] = []
        self._objects: dict[str, Json] = {}
        self.before_read: Callable[[], None] = lambda: None
        self.term: Term | None = None
        self._versions = iter(range(1000, 10**6))
        self._changes = changes

    async def get(self, *_: object) -> Json:
        raise ApiError(404, "not found")

    async def apply(self, resource: Any, obj: Json, subresource: str | None = None) -> Json:
        if subresource != "status":
            return obj
        table = self.cache.policies if resource.kind == "TenantPolicy" else self.cache.pools
        stored = self._objects[obj["metadata"]["uid"]]
        stored["status"] = obj["status"]
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        self.written.append(obj)
        assert table.get(obj["metadata"]["uid"])
        self._changes.notify()
        return stored

    async def create(self, resource: Any, obj: Json) -> Json:
        return obj

    async def read_secrets(self, keys: Iterable[ObjectKey]) -> None:
        self.before_read()
        await asyncio.sleep(0)
        for key in keys:
            if key in self.secrets:
                self.cache.secrets.take(self.secrets[key])
            else:
                self.cache.secrets.set_absent(key, 0)

    def store(self, kind: str, name: str, **spec: Any) -> None:
        """Store an object, and let the watch tell of it."""
        obj = {"apiVersion": "evenhand.dev/v1alpha1", "kind": kind, "metadata": self._meta(name), "spec": spec}
        self._objects[obj["metadata"]["uid"]] = obj
        (self.cache.policies if kind == "TenantPolicy" else self.cache.pools).observe("ADDED", obj)

    def store_secret(self, name: str) -> None:
        value = base64.b64encode(f"a-key-that-nobody-can-guess-{name}".encode()).decode()
        self.secrets["n", name] = {"metadata": self._meta(name), "data": {"key": value}}

    def _meta(self, name: str) -> Json:
        version = str(next(self._versions))
        created = "2026-01-01T00:00:00Z"
        uid = f"uid-{name}-{version}"
        return {
            "name": name,
            "namespace": "n",
            "uid": uid,
            "resourceVersion": version,
            "generation": 1,
            "creationTimestamp": created,
        }

    def accepted(self, name: str) -> list[str]:
        """Reasons of the condition Accepted that were written of an object, in order."""
        return [
            condition["reason"]
            for obj in self.written
            if obj["metadata"]["name"] == name
            for condition in obj["status"]["conditions"]
            if condition["type"] == "Accepted"
        ]

    def documents_changed(self) -> None:
        if self.term:
            self.term.documents_changed()

    def pods_changed(self) -> None:
        pass

    def statuses_changed(self) -> None:
        if self.term:
            self.term.statuses_changed()

    def gap_seen(self) -> None:
        pass


@contextlib.asynccontextmanager
async def term(api: Api) -> AsyncIterator[None]:
    settings = Settings(quiet_seconds=0.005, longest_wait_seconds=0.02, settle_seconds=0.01)
    lease, issuer = SimpleNamespace(epoch=1), SimpleNamespace(issuer=None)
    around: Any = Surroundings(settings, "c1", api.cache, api, None, api, lease, issuer)  # type: ignore[arg-type]
    try:
        async with asyncio.TaskGroup() as tasks:
            api.term = Term(around, tasks)
            yield
            raise _Over
    except* _Over:
        pass


class _Over(Exception):
    """Ends a term, as the loss of the Lease does."""


@pytest.fixture
def api(changes: Any) -> Api:
    api = Api(changes)
    api.store("EnginePool", "default", selector={"matchLabels": {"app": "engine"}})
    api.store_secret("evenhand-push")
    return api


def keyed(secret: str) -> Json:
    return {"identities": [{"name": "keys", "type": "APIKey", "apiKey": {"secretRef": {"name": secret}}}]}


async def test_policy_that_arrives_while_secrets_are_read_waits_for_its_own(api: Api, changes: Any) -> None:
    api.store("TenantPolicy", "early", **keyed("early"))
    api.store_secret("early")
    api.store_secret("late")

    def arrive() -> None:
        api.before_read = lambda: None
        api.store("TenantPolicy", "late", **keyed("late"))

    api.before_read = arrive
    async with term(api):
        await changes.until(lambda: api.accepted("late"))
    assert api.accepted("early") == api.accepted("late") == ["Accepted"]


async def test_api_server_that_fails_while_secrets_are_read_is_asked_again(
    api: Api, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.term._RETRY_SECONDS", 0.01)
    api.store("TenantPolicy", "early", **keyed("early"))
    api.store_secret("early")

    def fail() -> None:
        api.before_read = lambda: None
        raise ApiError(503, "starting")

    api.before_read = fail
    async with term(api):
        await changes.until(lambda: api.accepted("early"))
    assert api.accepted("early") == ["Accepted"]
