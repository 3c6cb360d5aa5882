"""What an engine believes, what it enforces, and what it still has after a restart."""

import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request

from evenhand_engine.frontend.config_store import StoredConfig
from evenhand_engine.frontend.push_receiver import PushReceiver, PushSettings, is_local
from evenhand_policy.bootstrap import pack
from evenhand_policy.config import KvCacheShare, PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.push_document import DocumentRejectedError
from evenhand_policy.push_protocol import (
    CONFIG_PATH,
    NONCE_HEADER,
    REPLICAS_HEADER,
    REPORT_PATH,
    SIGNATURE_HEADER,
    TIME_HEADER,
    ConfigSource,
    EngineReport,
    body_digest,
    is_answer_signed,
    sign_request,
)

KEY, NEXT_KEY = b"a-push-key-of-the-pool-0001", b"a-push-key-of-the-pool-0002"
POOL = PoolReference(namespace="inference", name="default")


def document(revision: int = 1, epoch: int = 1, **changes: Any) -> SchedulerConfig:
    tenants = changes.pop("tenants", (TenantConfig(tenant_id="chat", weight=4),))
    values = {"cluster": "c1", "pool": POOL, "epoch": epoch, "revision": revision, "tenants": tenants} | changes
    return SchedulerConfig(**values)


class Engine:
    """A receiver in a bare application; `enforced` is what it was told to enforce, in order."""

    def __init__(self, folder: Path, apply: Callable[[SchedulerConfig, int], None] | None = None) -> None:
        self.folder = folder
        self.enforced: list[tuple[SchedulerConfig, int]] = []
        self.now = time.time()
        self._also = apply
        keys = folder / "keys"
        keys.mkdir(exist_ok=True)
        if not any(keys.iterdir()):
            (keys / "current").write_bytes(KEY + b"\n")
        (folder / "bootstrap").mkdir(exist_ok=True)
        settings = PushSettings(POOL, keys, folder / "bootstrap", folder / "state" / "last-good.json")
        self.receiver = PushReceiver(settings, self._apply, clock=lambda: self.now)

    def _apply(self, offered: StoredConfig) -> None:
        if self._also:
            self._also(offered.config, offered.num_replicas)
        self.enforced.append((offered.config, offered.num_replicas))

    async def __aenter__(self) -> "Engine":
        app = web.Application(middlewares=[self.receiver.require_signature])
        app.add_routes(self.receiver.routes())
        app.router.add_get("/debug", self._debug)
        self.client = TestClient(TestServer(app, host="127.0.0.1"))
        await self.client.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def _debug(self, _: web.Request) -> web.Response:
        return web.Response(text="secret")

    async def put(
        self,
        config: SchedulerConfig | bytes,
        *,
        key: bytes = KEY,
        num_replicas: int = 1,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> tuple[int, EngineReport]:
        signed = config if isinstance(config, bytes) else config.canonical_json()
        own = sign_request(key, "PUT", self.now, num_replicas=num_replicas, digest=body_digest(signed))
        sent = own | (headers or {})
        async with self.client.put(CONFIG_PATH, data=signed if body is None else body, headers=sent) as response:
            answer = await response.read()
            signature = response.headers.get(SIGNATURE_HEADER, "")
            if signature:
                assert is_answer_signed(key, sent[NONCE_HEADER], response.status, answer, signature)
            return response.status, msgspec.json.decode(answer, type=EngineReport if signature else Any)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with Engine(tmp_path) as engine:
        yield engine


async def test_pushed_document_is_enforced_and_reported(engine: Engine) -> None:
    config = document()
    status, report = await engine.put(config, num_replicas=3)
    assert status == 200
    assert engine.enforced[1:] == [(config, 3)]
    assert (report.epoch, report.revision, report.digest, report.num_replicas) == (1, 1, config.digest(), 3)
    assert report.source == ConfigSource.PUSH
    assert report.boot_id == engine.receiver.boot_id
    assert report.problem is None


async def test_everybody_shares_before_the_first_push(engine: Engine) -> None:
    assert engine.enforced == [(SchedulerConfig(), 1)]
    assert engine.receiver.in_force.source is ConfigSource.BUILT_IN


async def test_same_document_again_changes_nothing(engine: Engine) -> None:
    await engine.put(document())
    status, _ = await engine.put(document())
    assert (status, len(engine.enforced)) == (200, 2)


async def test_number_of_replicas_travels_beside_the_document(engine: Engine) -> None:
    await engine.put(document(), num_replicas=1)
    engine.now += 1
    status, report = await engine.put(document(), num_replicas=2)
    assert (status, report.num_replicas, engine.enforced[-1][1]) == (200, 2, 2)
    engine.now -= 0.5  # sent between the two, and late
    status, report = await engine.put(document(), num_replicas=5)
    assert (status, report.num_replicas, engine.enforced[-1][1]) == (200, 2, 2)


@pytest.mark.parametrize(
    ("epoch", "revision", "accepted"),
    [(2, 5, True), (3, 4, True), (3, 6, True), (2, 4, False), (1, 9, False), (2, 3, False)],
)
async def test_only_a_newer_document_takes_its_place(engine: Engine, epoch: int, revision: int, accepted: bool) -> None:
    await engine.put(document(4, epoch=2))
    other = document(revision, epoch=epoch, tenants=())
    status, report = await engine.put(other)
    assert status == (200 if accepted else 409)
    assert engine.receiver.in_force.config == (other if accepted else document(4, epoch=2))
    assert (report.epoch, report.revision) == ((epoch, revision) if accepted else (2, 4))
    assert bool(report.problem) is not accepted


async def test_unknown_key_is_refused_and_answered_unsigned(engine: Engine) -> None:
    status, answer = await engine.put(document(), key=b"another-key-that-is-long-enough")
    assert status == 401
    assert set(answer) == {"problem"}
    assert len(engine.enforced) == 1


@pytest.mark.parametrize("header", [NONCE_HEADER, TIME_HEADER, REPLICAS_HEADER, SIGNATURE_HEADER])
@pytest.mark.parametrize("value", ["", "7", "x" * 32, "\xe4", "9" * 40])
async def test_nothing_that_is_signed_can_be_changed(engine: Engine, header: str, value: str) -> None:
    status, _ = await engine.put(document(), headers={header: value})
    assert status == 401
    assert len(engine.enforced) == 1


async def test_body_is_the_one_that_was_signed(engine: Engine) -> None:
    status, report = await engine.put(document(), body=document(2).canonical_json())
    assert (status, report.problem) == (401, "the body is not the one that was signed")
    assert len(engine.enforced) == 1


async def test_request_cannot_be_replayed(engine: Engine) -> None:
    config = document()
    headers = sign_request(KEY, "PUT", engine.now, digest=config.digest())
    assert (await engine.put(config, headers=headers))[0] == 200
    status, report = await engine.put(config, headers=headers)
    assert (status, report.problem) == (401, "the request was sent before")
    engine.now += 119  # its nonce is remembered for as long as its time is believed
    status, report = await engine.put(config, headers=headers)
    assert status == 401


@pytest.mark.parametrize(("skew", "status"), [(-59, 200), (59, 200), (-61, 401), (61, 401)])
async def test_request_is_of_now(engine: Engine, skew: float, status: int) -> None:
    config = document()
    headers = sign_request(KEY, "PUT", engine.now + skew, digest=config.digest())
    answered, report = await engine.put(config, headers=headers)
    assert answered == status
    assert status == 200 or "clock" in str(report.problem)


async def test_signature_of_a_get_is_not_one_of_a_put(engine: Engine) -> None:
    config = document()
    headers = sign_request(KEY, "GET", engine.now, digest=config.digest())
    assert (await engine.put(config, headers=headers))[0] == 401


async def test_keys_are_rotated_without_a_restart(engine: Engine) -> None:
    keys = engine.folder / "keys"
    (keys / "next").write_bytes(NEXT_KEY)
    assert (await engine.put(document(1), key=KEY))[0] == 200
    assert (await engine.put(document(2), key=NEXT_KEY))[0] == 200
    (keys / "current").unlink()
    assert (await engine.put(document(3), key=KEY))[0] == 401
    assert (await engine.put(document(3), key=NEXT_KEY))[0] == 200


async def test_weak_key_is_no_key(engine: Engine) -> None:
    (engine.folder / "keys" / "current").write_bytes(b"guessable")
    assert (await engine.put(document(), key=b"guessable"))[0] == 401


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"pool": PoolReference(namespace="inference", name="other")}, "pool"),
        ({"pool": None}, "pool"),
        ({"cluster": "c2"}, "cluster"),
    ],
)
async def test_document_of_another_pool_or_cluster_is_refused(
    engine: Engine, changes: dict[str, Any], path: str
) -> None:
    await engine.put(document())
    status, report = await engine.put(document(2, **changes))
    assert (status, report.path, len(engine.enforced)) == (401, path, 2)


def tenant(**changes: Any) -> TenantConfig:
    return TenantConfig(**({"tenant_id": "chat"} | changes))


HASH = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (document(schema_version=2), "schemaVersion"),
        (document(0), "epoch"),
        (document(epoch=0), "epoch"),
        (document(tenants=(tenant(), tenant(tenant_id="d", weight=0))), "tenants[1].weight"),
        (document(tenants=(tenant(key_hashes=("plain-text-key",)),)), "tenants[0].keyHashes[0]"),
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
        (b'{"schemaVersion": 1, "tenants": [{"tenantId": "a", "wieght": 1}]}', "tenants[0]"),
        (b'{"schemaVersion": 1', ""),
        (b"", ""),
        (b"[" * 100_000, ""),
    ],
)
async def test_what_cannot_be_enforced_is_rejected_with_its_path(
    engine: Engine, config: SchedulerConfig | bytes, path: str
) -> None:
    await engine.put(document(), num_replicas=2)
    status, report = await engine.put(config)
    assert (status, report.path) == (422, path)
    assert report.problem
    assert (report.epoch, report.revision) == (1, 1)
    assert len(engine.enforced) == 2


async def test_engine_that_cannot_enforce_keeps_what_it_has(tmp_path: Path) -> None:
    def apply(config: SchedulerConfig, _: int) -> None:
        if config.revision == 2:
            raise DocumentRejectedError("tenants[0].kvCache", "there is no memory for that")

    async with Engine(tmp_path, apply) as engine:
        await engine.put(document(1))
        status, report = await engine.put(document(2))
        assert (status, report.path, report.revision) == (422, "tenants[0].kvCache", 1)
        assert (await engine.put(document(3)))[0] == 200
    assert Engine(tmp_path).receiver.in_force.config.revision == 3


async def test_body_beyond_the_bound_is_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.MAX_DOCUMENT_BYTES", 1000)
    status, report = await engine.put(b"x" * 1001)
    assert (status, report.problem) == (422, "a document has 0 MiB at most")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    body = b"x" * 10_000
    headers = sign_request(KEY, "PUT", engine.now, digest=body_digest(body))
    async with engine.client.put(CONFIG_PATH, data=chunks(), headers=headers) as response:
        assert response.status == 422


async def test_restarted_pod_has_its_last_good_config(engine: Engine) -> None:
    await engine.put(document(7), num_replicas=3)
    file = engine.folder / "state" / "last-good.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["last-good.json"]
    again = Engine(engine.folder)
    assert again.enforced == [(document(7), 3)]
    assert again.receiver.in_force.source is ConfigSource.LAST_GOOD
    assert again.receiver.boot_id != engine.receiver.boot_id
    async with again:
        assert (await again.put(document(6)))[0] == 409
        assert (await again.put(document(7)))[0] == 200


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace(b"chat", b"spam"), lambda _: b""])
async def test_damaged_file_is_left_alone(engine: Engine, damage: Callable[[bytes], bytes]) -> None:
    await engine.put(document(7))
    file = engine.folder / "state" / "last-good.json"
    file.write_bytes(damage(file.read_bytes()))
    assert Engine(engine.folder).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_pod_that_cannot_save_still_enforces(engine: Engine) -> None:
    (engine.folder / "state").write_text("a file where the folder should be")
    assert (await engine.put(document(7)))[0] == 200
    assert engine.enforced[-1][0] == document(7)


def mount_bootstrap(folder: Path, config: SchedulerConfig, key: bytes = KEY) -> None:
    for secret in pack(config.canonical_json(), config.epoch, config.revision, 4, (NEXT_KEY, key)):
        for name, content in secret.items():
            (folder / "bootstrap" / name).write_bytes(content)


async def test_new_pod_starts_with_the_mounted_document(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, document(9))
    engine = Engine(tmp_path)
    assert engine.enforced == [(document(9), 4)]
    assert engine.receiver.in_force.source is ConfigSource.BOOTSTRAP


@pytest.mark.parametrize(("mounted", "saved", "expected"), [(9, 7, 9), (7, 9, 9)])
async def test_newest_of_what_is_stored_is_enforced(engine: Engine, mounted: int, saved: int, expected: int) -> None:
    await engine.put(document(saved))
    mount_bootstrap(engine.folder, document(mounted))
    assert Engine(engine.folder).receiver.in_force.config.revision == expected


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "part-0").unlink(),
        lambda folder: (folder / "part-0").write_bytes(b"of another document"),
        lambda folder: (folder / "manifest.signatures").write_bytes(b"0" * 64),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_bytes(b"{}"),
    ],
)
async def test_incomplete_or_forged_set_is_not_loaded(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, document(9))
    spoil(tmp_path / "bootstrap")
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_set_signed_with_a_stranger_key_is_not_loaded(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, document(9), key=b"a-key-that-this-pod-never-had")
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_stored_config_of_another_pool_is_not_enforced(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, document(9, pool=PoolReference(namespace="inference", name="other")))
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_signed_get_tells_what_is_in_force(engine: Engine) -> None:
    await engine.put(document(3))
    headers = sign_request(KEY, "GET", engine.now, path=REPORT_PATH)
    async with engine.client.get(REPORT_PATH, headers=headers) as response:
        body = await response.read()
        assert is_answer_signed(KEY, headers[NONCE_HEADER], 200, body, response.headers[SIGNATURE_HEADER])
    assert msgspec.json.decode(body, type=EngineReport).revision == 3


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1"])
def test_this_machine_is_local(address: str) -> None:
    assert is_local(request_from(address))


def test_a_web_page_that_rebinds_its_name_to_this_machine_is_not() -> None:
    request = request_from("127.0.0.1").clone(headers={"Host": "attacker.example"})
    assert not is_local(request)


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.1.1", "fe80::1", "", "nonsense"])
def test_others_are_not(address: str) -> None:
    assert not is_local(request_from(address))


def request_from(address: str) -> web.Request:
    transport = SimpleNamespace(
        get_extra_info=lambda name, default=None: (address, 1) if name == "peername" else default
    )
    return make_mocked_request("GET", REPORT_PATH, headers={"Host": "localhost:9000"}, transport=transport)


async def test_stranger_reads_nothing_unsigned(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(path: str, headers: dict[str, str] | None = None) -> int:
        async with engine.client.get(path, headers=headers) as response:
            return response.status

    assert await get(REPORT_PATH) == await get("/debug") == 200
    monkeypatch.setattr("evenhand_engine.frontend.push_receiver.is_local", lambda _: False)
    assert await get(REPORT_PATH) == await get("/debug") == 401
    assert await get(REPORT_PATH, sign_request(KEY, "GET", engine.now, path=REPORT_PATH)) == 200
    assert await get("/debug", sign_request(KEY, "GET", engine.now, path="/debug")) == 200
    assert await get("/debug?x=1", sign_request(KEY, "GET", engine.now, path="/debug")) == 401
