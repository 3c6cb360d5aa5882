"""Which documents an engine enforces, in which order, and which it refuses."""

import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from evenhand_policy.config import Gateway, KvCacheShare, PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.push_document import DocumentRejectedError, encode_document
from evenhand_policy.push_protocol import (
    CONFIG_PATH,
    ConfigSource,
)
from evenhand_policy.version import Assignment, Version

from .conftest import CHAT, POOL, Engine, document


async def test_pushed_document_is_enforced_and_reported(engine: Engine) -> None:
    status, report = await engine.put(CHAT, num_replicas=3)
    assert status == 200
    assert engine.enforced == [(CHAT, 3)]
    assert report.assignment == Assignment(Version(1, 1), encode_document(CHAT).digest, 3)
    assert report.source == ConfigSource.PUSH
    assert report.boot_id == engine.receiver.boot_id
    assert (report.problem, report.ailment) == (None, "")


async def test_nothing_is_enforced_before_the_first_push(engine: Engine) -> None:
    assert engine.enforced == []
    assert engine.receiver.in_force.source is ConfigSource.BUILT_IN


async def test_same_document_again_changes_nothing(engine: Engine) -> None:
    await engine.put()
    status, _ = await engine.put()
    assert (status, len(engine.enforced)) == (200, 1)


async def test_version_and_replicas_travel_beside_the_document(engine: Engine) -> None:
    await engine.put(CHAT, 1)
    status, report = await engine.put(CHAT, 2, num_replicas=2, method="PATCH")
    assert (status, report.revision, engine.enforced[-1]) == (200, 2, (CHAT, 2))
    status, report = await engine.put(CHAT, 1, num_replicas=5, method="PATCH")  # late
    assert (status, report.revision, engine.enforced[-1][1]) == (409, 2, 2)
    status, report = await engine.put(CHAT, 2, num_replicas=5, method="PATCH")
    assert (status, engine.enforced[-1][1]) == (409, 2), "a version stands for one number of replicas"
    assert Engine(engine.folder).enforced == [(CHAT, 2)], "it is kept for the next start"


async def test_document_that_is_not_there_is_asked_for(engine: Engine) -> None:
    await engine.put(CHAT, 1)
    status, report = await engine.put(document(tenants=()), 2, method="PATCH")
    assert (status, report.revision, len(engine.enforced)) == (412, 1, 1)
    assert (await engine.put(document(tenants=()), 2))[0] == 200


@pytest.mark.parametrize(
    ("epoch", "revision", "accepted"),
    [(2, 5, True), (3, 4, True), (3, 6, True), (2, 4, False), (1, 9, False), (2, 3, False)],
)
async def test_only_a_newer_document_takes_its_place(engine: Engine, epoch: int, revision: int, accepted: bool) -> None:
    await engine.put(CHAT, 4, 2)
    other = document(tenants=())
    status, report = await engine.put(other, revision, epoch)
    assert status == (200 if accepted else 409)
    assert engine.receiver.in_force.config == (other if accepted else CHAT)
    assert report.assignment.version == ((epoch, revision) if accepted else (2, 4))
    assert bool(report.problem) is not accepted


async def test_body_is_the_one_that_was_signed(engine: Engine) -> None:
    status, report = await engine.put(body=encode_document(document(tenants=())).compressed)
    assert (status, report.problem) == (422, "the content is not that of its digest")
    assert engine.enforced == []


async def test_bomb_does_not_go_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_policy.push_document.MAX_DOCUMENT_BYTES", 1000)
    status, report = await engine.put(body=zlib.compress(b"0" * 100_000_000))
    assert (status, report.problem) == (422, "the content is not that of its digest")
    assert (await engine.put(body=b"no zlib at all"))[0] == 422


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"pool": PoolReference(namespace="inference", name="other")}, "pool"),
        ({"pool": None}, "pool"),
        ({"cluster": "c2"}, "cluster"),
    ],
)
@pytest.mark.parametrize("where", ["in the document", "in what is said beside it"])
async def test_document_of_another_pool_or_cluster_is_refused(
    engine: Engine, changes: dict[str, Any], path: str, where: str
) -> None:
    await engine.put()
    if where == "in the document":
        status, report = await engine.put(document(**changes), 2)
    elif changes.get("pool", POOL) is None:
        return
    else:
        status, report = await engine.put(CHAT, 2, method="PATCH", **changes)
    assert (status, report.path, len(engine.enforced)) == (401, path, 1)


def tenant(**changes: Any) -> TenantConfig:
    return TenantConfig(**({"tenant_id": "chat"} | changes))


HASH = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (document(schema_version=2), "schemaVersion"),
        (document(tenants=(tenant(), tenant(tenant_id="d", weight=0))), "tenants[1].weight"),
        (document(tenants=(tenant(key_hashes=("plain-text-key",)),)), "tenants[0].keyHashes[0]"),
        (document(tenants=(tenant(key_hashes=(HASH, HASH[:-1] + "g")),)), "tenants[0].keyHashes[1]"),
        (document(tenants=(tenant(key_hashes=("a" + HASH[:-1],)),)), "tenants[0].keyHashes[0]"),
        (document(gateway=Gateway(key_hashes=(HASH[:-1] + "\u0661",))), "gateway.keyHashes[0]"),
        (document(tenants=(tenant(), tenant())), "tenants"),
        (document(tenants=(tenant(tenant_id="b"), tenant(tenant_id="a"))), "tenants"),
        (document(tenants=(tenant(tenant_id="default"),)), "tenants"),
        (document(tenants=(tenant(kv_cache=KvCacheShare(guaranteed_percent=9, max_percent=8)),)), "tenants[0].kvCache"),
        (
            document(
                tenants=tuple(
                    tenant(tenant_id=name, kv_cache=KvCacheShare(guaranteed_percent=51)) for name in ("a", "b")
                )
            ),
            "tenants",
        ),
        (
            document(tenants=tuple(tenant(tenant_id=name, key_hashes=(HASH,)) for name in ("a", "b"))),
            "tenants[1].keyHashes",
        ),
        (
            document(tenants=(tenant(tenant_id="a", service_accounts=("s",)), tenant(service_accounts=("s#1",)))),
            "tenants[1].serviceAccounts",
        ),
        (b'{"schemaVersion": 1, "tenants": [{"tenantId": "a", "wieght": 1}]}', "tenants[0]"),
        (b'{"schemaVersion": 1', ""),
        (b"", ""),
        (b"[" * 100_000, ""),
    ],
)
async def test_what_cannot_be_enforced_is_rejected_with_its_path(
    engine: Engine, config: SchedulerConfig | bytes, path: str
) -> None:
    await engine.put(num_replicas=2)
    status, report = await engine.put(config, 2)
    assert (status, report.path) == (422, path)
    assert report.problem
    assert (report.epoch, report.revision) == (1, 1)
    assert len(engine.enforced) == 1


async def test_engine_that_cannot_enforce_keeps_what_it_has(tmp_path: Path) -> None:
    refused = document(tenants=())

    def apply(config: SchedulerConfig, _: int) -> None:
        if config == refused:
            raise DocumentRejectedError("tenants[0].kvCache", "there is no memory for that")

    async with Engine(tmp_path, apply) as engine:
        await engine.put(CHAT, 1)
        status, report = await engine.put(refused, 2)
        assert (status, report.path, report.revision) == (422, "tenants[0].kvCache", 1)
        assert (await engine.put(CHAT, 3))[0] == 200
    assert Engine(tmp_path).version == (1, 3)


async def test_body_beyond_the_bound_is_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.MAX_DOCUMENT_BYTES", 1000)
    status, report = await engine.put(body=b"x" * 1001)
    assert (status, report.problem) == (422, "a document has 0 MiB at most")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    headers = engine.sign("PUT", Assignment(Version(1, 1), encode_document(CHAT).digest, 1))
    async with engine.client.put(CONFIG_PATH, data=chunks(), headers=headers) as response:
        assert response.status == 422


async def test_last_rejected_document_is_told_until_one_is_in_force_again(engine: Engine) -> None:
    in_force = engine.receiver.in_force
    await engine.put(CHAT, 2)
    await engine.put(CHAT, 1)
    assert in_force.error is None, "a late request is no config that was rejected"
    await engine.put(document(tenants=(tenant(weight=0),)), 3)
    assert in_force.error is not None and in_force.error.startswith("tenants[0].weight: ")
    assert in_force.results == {"applied": 1, "rejected": 1}
    await engine.put(CHAT, 2)
    assert (in_force.error, in_force.rejected_at) == (None, None)
