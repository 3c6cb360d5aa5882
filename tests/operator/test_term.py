"""A leader's term, with an API server that remembers what was written and pods that are none."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_operator.cache import Cache
from evenhand_operator.debounce import Debounce
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.kube import ApiError
from evenhand_operator.objects import ObjectKey
from evenhand_operator.settings import Settings
from evenhand_operator.signals import Signals
from evenhand_operator.term import Surroundings, Term
from evenhand_policy.bootstrap import unpack
from evenhand_policy.push_document import understood_members
from harness.builders import NAMESPACE, make_pod, make_policy, make_pool, make_secret

Json = dict[str, Any]

SETTINGS = Settings(quiet_seconds=0.005, longest_wait_seconds=0.02, settle_seconds=0.01)


class Api:
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
async def term(api: Api, client: EngineClient | None = None, settings: Settings = SETTINGS) -> AsyncIterator[None]:
    issuer, told = SimpleNamespace(issuer=None), asyncio.Event()
    parts: Any = (settings, "c1", api.cache, api.signals, api, client, api.key, api, api, issuer, told)
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
async def api(changes: Any, make: Any) -> Api:
    api = Api(changes, make.key)
    api.store("EnginePool", "default", selector={"matchLabels": {"app": "engine"}})
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
        await changes.until(lambda: api.condition("a", "Ready") == ("True", "Ready"))
        await changes.until(lambda: bool(api.accepted("default")))


async def test_what_is_in_force_is_stored_before_the_end(api: Api, changes: Any) -> None:
    api.store("TenantPolicy", "a")
    async with term(api):
        await changes.until(lambda: len(api.written) == 2)
    assert api.stored == ["manifest"], "whom to believe is said at once, the document waits for more changes"
    assert api.term is not None
    assert await api.term.store()
    assert api.stored == ["manifest", "0", "manifest"]
    assert await api.term.store()
    assert len(api.stored) == 3, "what is stored is not stored again"


async def test_what_somebody_deleted_comes_back_however_often_something_changes(api: Api, changes: Any) -> None:
    async def refresh() -> bool:
        return False

    api.key.refresh = refresh
    api.signals.stored = Debounce(0.005, 0.02)
    async with term(api, settings=replace(SETTINGS, relist_seconds=0.1)):
        await changes.until(lambda: "evenhand-bootstrap-default-0" in api.bootstrap)
        del api.bootstrap["evenhand-bootstrap-default-0"]

        def change() -> bool:
            api.signals.stored.signal()
            return "evenhand-bootstrap-default-0" in api.bootstrap

        await changes.until(change)


async def test_what_is_stored_is_signed_by_a_new_key_before_any_pod_answers(
    api: Api, changes: Any, client: EngineClient
) -> None:
    """So that pods that start meanwhile find whom to believe and what to begin with, in one piece."""
    api.store("TenantPolicy", "a")
    async with term(api):
        await changes.until(lambda: len(api.written) == 2)
        assert api.term and await api.term.store()
    new = Ed25519PrivateKey.generate()
    api.key = SimpleNamespace(current=new, trusted=(new.public_key(),), refresh=None)
    api.store_pod("pod-0", "http://127.0.0.1:1")
    async with term(api, client):
        await changes.until(lambda: len(api.stored) == 4)
    files = {
        name: base64.b64decode(content) for secret in api.bootstrap.values() for name, content in secret["data"].items()
    }
    _, document = unpack(files, (new.public_key(),))
    assert [tenant["tenantId"] for tenant in json.loads(document)["tenants"]] == ["a"]


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
    pod, newer = make.pod("pod-0", stand_in.url), make.offer(30, epoch=9)
    await client.send(pod, newer, (await client.read(pod, newer)).boot_id)
    api.store_pod("pod-0", stand_in.url)
    async with term(api, client):
        api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: api.accepted("a") and api.condition("a", "Ready")[0] == "True")
    in_force = stand_in.receiver.in_force
    assert [tenant.weight for tenant in in_force.config.tenants] == [5]
    assert in_force.assignment.version.epoch == 10
    assert in_force.assignment.version.revision > 30


async def test_pod_that_claims_an_epoch_that_nobody_could_overtake_bricks_nothing(
    api: Api, changes: Any, engine: Any, client: EngineClient, make: Any
) -> None:
    liar, honest = await engine("pod-0"), await engine("pod-1")
    claimed = make.offer(1, epoch=2**62)
    pod = make.pod("pod-0", liar.url)
    await client.send(pod, claimed, (await client.read(pod, claimed)).boot_id)
    api.store_pod("pod-0", liar.url)
    api.store_pod("pod-1", honest.url)
    async with term(api, client):
        api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: [each.weight for each in honest.receiver.in_force.config.tenants] == [5])
        await asyncio.sleep(0.1)
    assert api.epoch == 1
    assert honest.receiver.in_force.assignment.version.epoch == 1


async def test_new_leader_takes_over_without_sending_what_is_in_force(
    api: Api, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    api.store_pod("pod-0", stand_in.url)
    api.store("TenantPolicy", "a", weight=5)
    async with term(api, client):
        await changes.until(lambda: api.accepted("a") and api.condition("a", "Ready")[0] == "True")
        assert api.term
        await api.term.store()
    revision = stand_in.revision
    stand_in.requests.clear()
    api.epoch = 2
    async with term(api, client):
        await changes.until(lambda: stand_in.receiver.in_force.assignment.version.epoch == 2)
    assert stand_in.revision == revision, "the same content is the same revision"
    assert "PUT" not in stand_in.requests


async def test_new_leader_that_finds_nothing_stored_goes_on_above_what_was_reported(
    api: Api, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    api.store_pod("pod-0", stand_in.url)
    for weight in (5, 6):
        async with term(api, client):
            api.store("TenantPolicy", f"a{weight}", weight=weight)
            await changes.until(lambda w=weight: api.condition(f"a{w}", "Ready")[0] == "True")  # type: ignore[misc]
        before, api.bootstrap = stand_in.revision, {}
        api.epoch += 1
    async with term(api, client):
        await changes.until(lambda: stand_in.receiver.in_force.assignment.version.epoch == 3)
    assert stand_in.revision > before


async def test_document_is_left_alone_while_the_pool_is_paused(
    api: Api, changes: Any, engine: Any, client: EngineClient
) -> None:
    stand_in = await engine()
    api.store_pod("pod-0", stand_in.url)
    async with term(api, client):
        api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: api.condition("a", "Ready")[0] == "True")
        api.edit("default", paused=True)
        api.store("TenantPolicy", "b", weight=6)
        await changes.until(lambda: api.condition("b", "Ready") == ("False", "Paused"))
        assert api.condition("default", "Ready") == ("False", "Paused")
        assert [each.tenant_id for each in stand_in.receiver.in_force.config.tenants] == ["a"]
        other = await engine("pod-1")
        api.store_pod("pod-1", other.url)
        await changes.until(lambda: other.revision > 0)
        assert [each.tenant_id for each in other.receiver.in_force.config.tenants] == ["a"], (
            "a new pod has what all have"
        )
        assert api.term and await api.term.store()
    api.epoch = 2
    async with term(api, client):
        await changes.until(lambda: stand_in.receiver.in_force.assignment.version.epoch == 2)
        assert [each.tenant_id for each in stand_in.receiver.in_force.config.tenants] == ["a"], (
            "also under another leader"
        )
        api.edit("default", paused=False)
        await changes.until(lambda: api.condition("b", "Ready")[0] == "True")


async def test_paused_pool_of_which_nothing_is_stored_any_more_is_told_nothing(
    api: Api, changes: Any, engine: Any, client: EngineClient
) -> None:
    """What its engines have been told is not known to the new leader; the newest document is not what they should have."""
    stand_in = await engine()
    api.store_pod("pod-0", stand_in.url)
    async with term(api, client):
        api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: api.condition("a", "Ready")[0] == "True")
    api.bootstrap = {}
    api.edit("default", paused=True)
    api.store("TenantPolicy", "b", weight=6)
    stand_in.requests.clear()
    async with term(api, client):
        await changes.until(lambda: api.condition("b", "Ready") == ("False", "Paused"))
        assert api.condition("default", "Ready") == ("False", "Paused")
        assert stand_in.requests == []
        api.edit("default", paused=False)
        await changes.until(lambda: api.condition("b", "Ready")[0] == "True")


@pytest.mark.parametrize(("on_deletion", "left"), [("Close", []), ("Keep", ["a"])])
async def test_pool_that_is_deleted_closes_where_it_says_so(
    api: Api, changes: Any, engine: Any, client: EngineClient, on_deletion: str, left: list[str]
) -> None:
    stand_in = await engine()
    api.store_pod("pod-0", stand_in.url)
    api.edit("default", onDeletion=on_deletion)
    async with term(api, client):
        api.store("TenantPolicy", "a", weight=5)
        await changes.until(lambda: api.condition("a", "Ready")[0] == "True")
        revision = stand_in.revision
        api.delete("default")
        await changes.until(lambda: api.condition("a", "Accepted") == ("False", "PoolNotFound"))
        if on_deletion == "Close":
            await changes.until(lambda: stand_in.revision > revision)
            assert stand_in.receiver.in_force.config.unknown_tenants.action == "Reject"
        assert [each.tenant_id for each in stand_in.receiver.in_force.config.tenants] == left


async def test_document_is_made_for_what_every_pod_understands(
    api: Api, changes: Any, engine: Any, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool of engines of two versions; then the older one goes."""
    old, new = await engine("pod-0"), await engine("pod-1")
    members = understood_members()
    monkeypatch.setattr(
        "evenhand_engine.frontend.push_receiver.understood_members", lambda: members - {"tenants.fairness"}
    )
    api.store_pod("pod-0", old.url)
    async with term(api, client):
        api.store("TenantPolicy", "a", fairness="PerUser", weight=3)
        api.store("TenantPolicy", "b", weight=3)
        await changes.until(lambda: api.condition("a", "Ready") == ("False", "NotUnderstood"))
        await changes.until(lambda: api.condition("b", "Ready")[0] == "True")
        assert [each.weight for each in old.receiver.in_force.config.tenants] == [3, 3]
        monkeypatch.setattr("evenhand_engine.frontend.push_receiver.understood_members", lambda: members)
        api.store_pod("pod-1", new.url)
        await changes.until(lambda: new.revision > 0)
        assert new.receiver.in_force.config == old.receiver.in_force.config
        api.delete_pod("pod-0")
        await changes.until(lambda: api.condition("a", "Ready")[0] == "True")
        assert [str(each.fairness) for each in new.receiver.in_force.config.tenants] == ["PerUser", "FIFO"]
