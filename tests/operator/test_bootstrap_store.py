"""What a new leader goes on from, and what pods start with: written so that what is there is always of one piece."""

import base64
import copy
import itertools
import random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_operator.bootstrap_store import BootstrapStore, SupersededError
from evenhand_operator.kube import ApiError
from evenhand_operator.observed import ObservedPool, read_pool
from evenhand_operator.offer import Offer
from evenhand_policy.bootstrap import KEYS_FILE, MANIFEST_FILE, DocumentTooLargeError, check_size
from evenhand_policy.config import PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.push_document import decompress, encode_document, read_document
from evenhand_policy.signatures import PublicKeys, read_key_set
from evenhand_policy.version import Version
from harness.builders import make_pool

Json = dict[str, Any]
KEY, OTHER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([index]) * 32) for index in (1, 2))
POOL = ("inference", "default")
PREFIX = "evenhand-bootstrap-default-"


class Secrets:
    """The part of KubeClient that the store uses; `writes` are the ends of the names of what was written, in order."""

    def __init__(self) -> None:
        self.stored: dict[str, Json] = {}
        self.writes: list[str] = []
        self.fail_at: str | None = None
        self._versions = itertools.count(1)

    async def get(self, _: object, namespace: str, name: str) -> Json:
        if name not in self.stored:
            raise ApiError(404, "not found")
        return copy.deepcopy(self.stored[name])

    async def create(self, _: object, obj: Json) -> Json:
        if obj["metadata"]["name"] in self.stored:
            raise ApiError(409, "exists")
        return self._store(obj)

    async def replace(self, _: object, obj: Json) -> Json:
        metadata = obj["metadata"]
        if metadata["resourceVersion"] != self.stored[metadata["name"]]["metadata"]["resourceVersion"]:
            raise ApiError(409, "changed meanwhile")
        return self._store(obj)

    def _store(self, obj: Json) -> Json:
        end = obj["metadata"]["name"].removeprefix(PREFIX)
        if end == self.fail_at:
            self.fail_at = None
            raise ApiError(503, "away")
        self.writes.append(end)
        stored = copy.deepcopy(obj)
        stored["metadata"]["resourceVersion"] = str(next(self._versions))
        self.stored[obj["metadata"]["name"]] = stored
        return copy.deepcopy(stored)


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


def store_on(secrets: Secrets, key: Ed25519PrivateKey = KEY, trusted: PublicKeys = ()) -> BootstrapStore:
    keys = SimpleNamespace(current=key, trusted=trusted or (KEY.public_key(), OTHER_KEY.public_key()))
    return BootstrapStore(secrets, keys)  # type: ignore[arg-type]


@pytest.fixture
def pool() -> ObservedPool:
    observed = read_pool(make_pool(meta={"uid": "u1"}))
    assert observed is not None
    return observed


def offer(revision: int, num_tenants: int = 1, epoch: int = 3) -> Offer:
    """20,000 tenants with keys are more than one part."""
    choose = random.Random(num_tenants)
    tenants = tuple(
        TenantConfig(tenant_id=f"t{index:05}", key_hashes=(f"sha256:{choose.getrandbits(256):064x}",))
        for index in range(num_tenants)
    )
    reference = PoolReference(namespace="inference", name="default")
    config = SchedulerConfig(cluster="c1", pool=reference, tenants=tenants)
    return Offer("c1", reference, encode_document(config), Version(epoch, revision), 2)


async def test_next_leader_reads_what_the_last_one_wrote(secrets: Secrets, pool: ObservedPool) -> None:
    written = offer(41)
    await store_on(secrets).write(pool, written)
    found = await store_on(secrets, OTHER_KEY).read(pool)
    assert (found.revision, found.num_replicas, found.document) == (41, 2, written.document)
    assert found.config == read_document(decompress(written.document.compressed, written.document.digest))
    for secret in secrets.stored.values():
        [owner] = secret["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("EnginePool", "default", "u1")
        assert secret["type"] == "evenhand.dev/bootstrap"


async def test_manifest_is_written_last_and_what_is_there_not_again(secrets: Secrets, pool: ObservedPool) -> None:
    store = store_on(secrets)
    await store.write(pool, offer(1, 40_000))
    assert secrets.writes == ["1", "0", "manifest"]
    await store.write(pool, offer(1, 40_000))
    assert secrets.writes == ["1", "0", "manifest"]
    await store.write(pool, offer(2, 40_000))
    assert secrets.writes[3:] == ["manifest"], "another version of the same document is said in little"
    await store.write(pool, offer(3))
    assert secrets.writes[4:] == ["1", "0", "manifest"], "what is no longer needed is emptied"
    assert secrets.stored[PREFIX + "1"]["data"] == {}


async def test_what_was_written_half_is_finished(secrets: Secrets, pool: ObservedPool) -> None:
    store = store_on(secrets)
    secrets.fail_at = "0"
    with pytest.raises(ApiError):
        await store.write(pool, offer(1, 40_000))
    assert (await store_on(secrets).read(pool)).document is None
    await store.write(pool, offer(1, 40_000))
    assert secrets.writes == ["1", "0", "manifest"]
    assert (await store_on(secrets).read(pool)).revision == 1


async def test_leader_writes_only_what_differs_from_what_it_read(secrets: Secrets, pool: ObservedPool) -> None:
    await store_on(secrets).write(pool, offer(1))
    successor = store_on(secrets)
    await successor.read(pool)
    secrets.writes.clear()
    await successor.write(pool, offer(1))
    assert secrets.writes == []


@pytest.mark.parametrize("lost", ["manifest", "0"])
async def test_what_somebody_deleted_is_restored_when_it_is_looked_for(
    secrets: Secrets, pool: ObservedPool, lost: str
) -> None:
    store = store_on(secrets)
    await store.write(pool, offer(1))
    del secrets.stored[PREFIX + lost]
    store.forget(POOL)
    await store.write(pool, offer(1))
    assert secrets.writes == ["0", "manifest", lost]


async def test_secrets_of_a_pool_that_was_made_again_belong_to_the_new_one(
    secrets: Secrets, pool: ObservedPool
) -> None:
    """Those of the old one are about to be collected."""
    store = store_on(secrets)
    await store.write(pool, offer(1))
    again = msgspec.structs.replace(pool, uid="u2")
    await store.write(again, offer(1))
    owners = {secret["metadata"]["ownerReferences"][0]["uid"] for secret in secrets.stored.values()}
    assert owners == {"u2"}


async def test_leader_that_slept_overwrites_nothing(secrets: Secrets, pool: ObservedPool) -> None:
    sleeper = store_on(secrets)
    await sleeper.write(pool, offer(1, epoch=3))
    await store_on(secrets).write(pool, offer(2, 5, epoch=4))
    before = copy.deepcopy(secrets.stored)
    with pytest.raises(ApiError, match="changed meanwhile"):
        await sleeper.write(pool, offer(7, 9, epoch=3))
    with pytest.raises(SupersededError):
        await sleeper.write(pool, offer(7, 9, epoch=3))
    assert secrets.stored == before


async def test_pods_are_told_whom_to_believe_before_there_is_a_document(secrets: Secrets, pool: ObservedPool) -> None:
    store = store_on(secrets)
    await store.trust(pool, offer(1))
    data = secrets.stored[PREFIX + "manifest"]["data"]
    assert len(read_key_set(base64.b64decode(data[KEYS_FILE]))) == 2
    await store.write(pool, offer(1))
    await store.trust(pool, offer(2))
    assert (await store_on(secrets).read(pool)).revision == 1, "what is stored stays"
    assert secrets.writes == ["manifest", "0", "manifest"]


async def test_what_another_key_has_signed_is_not_believed(secrets: Secrets, pool: ObservedPool) -> None:
    await store_on(secrets, OTHER_KEY).write(pool, offer(1))
    found = await store_on(secrets, trusted=(KEY.public_key(),)).read(pool)
    assert (found.revision, found.document) == (0, None)


@pytest.mark.parametrize(("offered", "revision"), [(offer(2, 40_000, epoch=4), 2), (offer(2, 5, epoch=4), 0)])
async def test_stored_document_is_signed_again_when_the_key_was_made_anew(
    secrets: Secrets, pool: ObservedPool, offered: Offer, revision: int
) -> None:
    """With the new keys in one write, if it is what is offered; another one might be anybody's, and is taken away."""
    await store_on(secrets, OTHER_KEY).write(pool, offer(1, 40_000, epoch=9))
    secrets.writes.clear()
    store = store_on(secrets, trusted=(KEY.public_key(),))
    await store.trust(pool, offered)
    assert secrets.writes == ["manifest"]
    assert (await store.read(pool)).revision == revision
    assert (MANIFEST_FILE in secrets.stored[PREFIX + "manifest"]["data"]) is bool(revision)


def test_document_that_does_not_fit_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    check_size(offer(2, 100).document)
    monkeypatch.setattr("evenhand_policy.bootstrap.PART_BYTES", 64)
    with pytest.raises(DocumentTooLargeError, match="can be stored"):
        check_size(offer(2, 100).document)
    monkeypatch.setattr("evenhand_policy.bootstrap.MAX_DOCUMENT_BYTES", 64)
    with pytest.raises(DocumentTooLargeError, match="are allowed"):
        check_size(offer(2, 100).document)


async def test_api_server_that_is_away_is_not_an_empty_store(
    secrets: Secrets, pool: ObservedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> Json:
        raise ApiError(0, "connection refused")

    monkeypatch.setattr(secrets, "get", away)
    with pytest.raises(ApiError):
        await store_on(secrets).read(pool)
