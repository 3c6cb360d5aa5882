"""A leader's term, with an API server that remembers what was written and pods that are none."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from evenhand_operator.cache import Cache
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.kube import ApiError
from evenhand_operator.objects import ObjectKey
from evenhand_operator.settings import Settings
from evenhand_operator.term import Surroundings, Term

Json = dict[str, Any]


class Api:
    """The parts of KubeClient, Lister and Lease that a term uses. `before_read` is called before Secrets are read."""

    def __init__(self, changes: Any) -> None:
        self.cache = Cache(self)
        self.secrets: dict[ObjectKey, Json] = {}
        self.written: list[Json] = []
        self.told: list[Json] = []  # by another field manager
        self.stored: list[Json] = []  # bootstrap Secrets
        self._objects: dict[str, Json] = {}
        self.before_read: Callable[[], None] = lambda: None
        self.fail_writes = 0
        self.epoch = 1
        self.installation = "evenhand-system/evenhand-operator"
        self.term: Term | None = None
        self.caught_up = asyncio.Event()
        self._versions = iter(range(1000, 10**6))
        self._changes = changes

    async def get(self, *_: object) -> Json:
        raise ApiError(404, "not found")

    async def apply(self, resource: Any, obj: Json, subresource: str | None = None, **told: str) -> Json:
        if told:
            self.told.append(obj)
            return obj
        if subresource != "status":
            self.stored.append(obj)
            return obj
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

    async def create(self, resource: Any, obj: Json) -> Json:
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
        obj = {"apiVersion": "evenhand.dev/v1alpha1", "kind": kind, "metadata": self._meta(name), "spec": spec}
        self._objects[obj["metadata"]["uid"]] = obj
        (self.cache.policies if kind == "TenantPolicy" else self.cache.pools).observe("ADDED", obj)

    def store_pod(self, name: str, url: str) -> None:
        """A ready engine pod, of which the watch tells."""
        host, _, port = url.removeprefix("http://").partition(":")
        metadata = self._meta(name) | {"namespace": "inference", "labels": {"app": "engine"}}
        ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        ports = [{"name": "admin", "containerPort": int(port)}]
        self.cache.pods.observe(
            "ADDED",
            {
                "metadata": metadata,
                "spec": {"containers": [{"name": "engine", "ports": ports}]},
                "status": {"podIP": host, "conditions": [ready]},
            },
        )

    def condition(self, name: str, kind: str) -> tuple[str, str]:
        """Status and reason as they are."""
        [obj] = [obj for obj in self._objects.values() if obj["metadata"]["name"] == name]
        rows = {row["type"]: (str(row["status"]), row["reason"]) for row in obj["status"]["conditions"]}
        return rows[kind]

    def store_secret(self, name: str) -> None:
        value = base64.b64encode(f"a-key-that-nobody-can-guess-{name}".encode()).decode()
        self.secrets["inference", name] = {"metadata": self._meta(name), "data": {"key": value}}

    def _meta(self, name: str) -> Json:
        version = str(next(self._versions))
        created = "2026-01-01T00:00:00Z"
        uid = f"uid-{name}-{version}"
        return {
            "name": name,
            "namespace": "inference",
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
        if self.term:
            self.term.pods_changed()

    def statuses_changed(self) -> None:
        if self.term:
            self.term.statuses_changed()

    def gap_seen(self) -> None:
        pass


@contextlib.asynccontextmanager
async def term(api: Api, client: EngineClient | None = None) -> AsyncIterator[None]:
    settings = Settings(quiet_seconds=0.005, longest_wait_seconds=0.02, settle_seconds=0.01)
    parts: Any = (settings, "c1", api.cache, api, client, api, api, SimpleNamespace(issuer=None), asyncio.Event())
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


async def test_next_leader_writes_nothing_that_is_right(api: Api, changes: Any) -> None:
    api.store("TenantPolicy", "a")
    api.store("TenantPolicy", "b")
    async with term(api):
        await changes.until(lambda: len(api.written) == 3)
    api.written.clear()
    api.epoch = 2
    async with term(api):
        await changes.until(lambda: bool(api.written))
        api.store("TenantPolicy", "c")
        await changes.until(lambda: bool(api.accepted("c")))
    assert {obj["metadata"]["name"] for obj in api.written} == {"default", "c"}, "the pool tells the new epoch"


async def test_status_that_could_not_be_written_is_written_later(
    api: Api, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.reporter._LOOK_SECONDS", 0.01)
    monkeypatch.setattr("evenhand_operator.status_writer._FIRST_PAUSE_SECONDS", 0.01)
    api.store("TenantPolicy", "a")
    api.fail_writes = 3
    async with term(api):
        await changes.until(lambda: len(api.written) == 2)
    assert api.condition("a", "Ready") == ("True", "Ready")


async def test_what_is_in_force_is_stored_before_the_end(api: Api, changes: Any) -> None:
    api.store("TenantPolicy", "a")
    async with term(api):
        await changes.until(lambda: len(api.written) == 2)
    assert api.stored == [], "that waits for more changes"
    assert api.term is not None
    assert await api.term.store()
    assert [obj["metadata"]["name"] for obj in api.stored] == ["evenhand-bootstrap-default-0"]
    assert await api.term.store()
    assert len(api.stored) == 1, "what is stored is not stored again"


async def test_pool_of_another_installation_is_left_alone(api: Api, changes: Any) -> None:
    """Its policies too: their statuses are the other's to write."""
    [theirs] = [obj for obj in api._objects.values() if obj["kind"] == "EnginePool"]
    theirs["status"] = {"operator": "default/evenhand-operator"}
    theirs["metadata"]["resourceVersion"] = str(int(theirs["metadata"]["resourceVersion"]) + 1)
    api.cache.pools.observe("MODIFIED", theirs)
    api.store("TenantPolicy", "theirs")
    api.store("EnginePool", "ours", selector={"matchLabels": {"app": "other"}})
    api.store("TenantPolicy", "ours-too", poolRef={"name": "ours"})
    async with term(api):
        await changes.until(lambda: len(api.written) == 2)
        await changes.until(lambda: len(api.told) == 1)
    assert {obj["metadata"]["name"] for obj in api.written} == {"ours", "ours-too"}
    assert [obj["metadata"]["name"] for obj in api.told] == ["default"]
    assert [obj["status"]["operator"] for obj in api.written if obj["metadata"]["name"] == "ours"] == [
        "evenhand-system/evenhand-operator"
    ]


async def test_policy_is_programmed_once_the_pod_enforces_it(
    api: Api, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    store_push_key(api, stand_in)
    api.store_pod("pod-0", stand_in.url)
    async with term(api, client):
        api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: api.accepted("a") and api.condition("a", "Ready")[0] == "True")
        assert [tenant.weight for tenant in stand_in.receiver.in_force.config.tenants] == [5]
    assert api.condition("a", "Programmed") == ("True", "Programmed")


async def test_pod_that_knows_a_newer_document_is_overtaken(
    api: Api, changes: Any, engine: Any, client: EngineClient, make: Any
) -> None:
    stand_in = await engine()
    await client.push(stand_in.url, make.offer(30, epoch=9))
    store_push_key(api, stand_in)
    api.store_pod("pod-0", stand_in.url)
    async with term(api, client):
        api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: api.accepted("a") and api.condition("a", "Ready")[0] == "True")
    config = stand_in.receiver.in_force.config
    assert (config.epoch, [tenant.weight for tenant in config.tenants]) == (10, [5])
    assert config.revision > 30


def store_push_key(api: Api, stand_in: Any) -> None:
    """The pool's push key is the engine's."""
    value = base64.b64encode((stand_in.keys / "current").read_bytes()).decode()
    api.secrets["inference", "evenhand-push"]["data"] = {"current": value}
