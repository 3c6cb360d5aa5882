"""What a new leader goes on from, and what pods start with: written so that what is there is always of one piece."""

import copy
import random
from typing import Any

import msgspec
import pytest

from evenhand_operator.bootstrap_store import BootstrapStore
from evenhand_operator.engine_client import Offer
from evenhand_operator.kube import ApiError
from evenhand_operator.observed import ObservedPool, read_pool
from evenhand_policy.config import SchedulerConfig, TenantConfig

Json = dict[str, Any]
KEY, OTHER_KEY = b"a-push-key-of-the-pool-0001", b"a-push-key-of-the-pool-0002"
POOL = ("inference", "default")


class Secrets:
    """The part of KubeClient that the store uses; `writes` are the indices of what was written, in order."""

    def __init__(self) -> None:
        self.stored: dict[str, Json] = {}
        self.writes: list[int] = []
        self.fail_at: int | None = None

    async def get(self, _: object, namespace: str, name: str) -> Json:
        if name not in self.stored:
            raise ApiError(404, "not found")
        return copy.deepcopy(self.stored[name])

    async def apply(self, _: object, obj: Json) -> Json:
        index = int(obj["metadata"]["name"].rpartition("-")[2])
        if index == self.fail_at:
            self.fail_at = None
            raise ApiError(503, "away")
        self.writes.append(index)
        self.stored[obj["metadata"]["name"]] = obj
        return obj


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


def store_on(secrets: Secrets) -> BootstrapStore:
    return BootstrapStore(secrets)  # type: ignore[arg-type]


@pytest.fixture
def pool() -> ObservedPool:
    metadata = {"name": "default", "namespace": "inference", "uid": "u1", "resourceVersion": "1", "generation": 1}
    spec = {"selector": {"matchLabels": {"app": "engine"}}}
    obj = {"apiVersion": "evenhand.dev/v1alpha1", "kind": "EnginePool", "metadata": metadata, "spec": spec}
    observed = read_pool(obj)
    assert observed is not None
    return observed


def offer(revision: int, num_tenants: int = 1, keys: tuple[bytes, ...] = (KEY,)) -> Offer:
    """20,000 tenants with keys are more than one part."""
    choose = random.Random(revision)
    tenants = tuple(
        TenantConfig(tenant_id=f"t{index:05}", key_hashes=(f"sha256:{choose.getrandbits(256):064x}",))
        for index in range(num_tenants)
    )
    config = SchedulerConfig(cluster="c1", epoch=3, revision=revision, tenants=tenants)
    return Offer(config.canonical_json(), config.digest(), 3, revision, 2, keys)


async def test_next_leader_reads_what_the_last_one_wrote(secrets: Secrets, pool: ObservedPool) -> None:
    written = offer(41)
    await store_on(secrets).write(pool, written)
    found = await store_on(secrets).read(POOL, (OTHER_KEY, KEY))
    assert (found.epoch, found.revision) == (3, 41)
    assert found.document == msgspec.json.decode(written.document, type=SchedulerConfig)
    [owner] = secrets.stored["evenhand-bootstrap-default-0"]["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("EnginePool", "default", "u1")


async def test_manifest_is_written_last_and_what_is_there_not_again(secrets: Secrets, pool: ObservedPool) -> None:
    store = store_on(secrets)
    await store.write(pool, offer(1, 40_000))
    assert secrets.writes == [1, 0]
    await store.write(pool, offer(1, 40_000))
    assert secrets.writes == [1, 0]
    await store.write(pool, offer(2))
    assert secrets.writes == [1, 0, 1, 0], "what is no longer needed is emptied"
    assert secrets.stored["evenhand-bootstrap-default-1"]["data"] == {}


async def test_what_was_written_half_is_finished(secrets: Secrets, pool: ObservedPool) -> None:
    store = store_on(secrets)
    secrets.fail_at = 0
    with pytest.raises(ApiError):
        await store.write(pool, offer(1, 40_000))
    assert (await store_on(secrets).read(POOL, (KEY,))).document is None
    await store.write(pool, offer(1, 40_000))
    assert secrets.writes == [1, 0]
    assert (await store_on(secrets).read(POOL, (KEY,))).revision == 1


async def test_leader_writes_only_what_differs_from_what_it_read(secrets: Secrets, pool: ObservedPool) -> None:
    await store_on(secrets).write(pool, offer(1))
    successor = store_on(secrets)
    await successor.read(POOL, (KEY,))
    secrets.writes.clear()
    await successor.write(pool, offer(1))
    assert secrets.writes == []
    successor.forget(POOL)
    await successor.write(pool, offer(1))
    assert secrets.writes == [0], "the pool was deleted, and its Secrets with it"


async def test_what_another_key_has_signed_is_not_believed(secrets: Secrets, pool: ObservedPool) -> None:
    await store_on(secrets).write(pool, offer(1, keys=(OTHER_KEY,)))
    found = await store_on(secrets).read(POOL, (KEY,))
    assert (found.epoch, found.revision, found.document) == (0, 0, None)


async def test_nothing_is_stored_that_nobody_could_believe(secrets: Secrets, pool: ObservedPool) -> None:
    await store_on(secrets).write(pool, offer(1, keys=()))
    assert secrets.writes == []


async def test_document_that_does_not_fit_is_not_stored_in_part(
    secrets: Secrets, pool: ObservedPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await store_on(secrets).write(pool, offer(1))
    monkeypatch.setattr("evenhand_policy.bootstrap.PART_BYTES", 64)
    secrets.writes.clear()
    await store_on(secrets).write(pool, offer(2, 100))
    assert secrets.writes == []
    assert "is not stored" in caplog.text


async def test_api_server_that_is_away_is_not_an_empty_store(secrets: Secrets, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> Json:
        raise ApiError(0, "connection refused")

    monkeypatch.setattr(secrets, "get", away)
    with pytest.raises(ApiError):
        await store_on(secrets).read(POOL, (KEY,))
