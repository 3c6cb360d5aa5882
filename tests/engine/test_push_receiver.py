"""What an engine believes, what it enforces, and what it still has after a restart."""

import asyncio
import base64
import os
import shutil
import stat
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_engine.frontend import config_store
from evenhand_engine.frontend.config_store import StoredConfig
from evenhand_engine.frontend.push_receiver import PushReceiver, PushSettings, is_local
from evenhand_policy.bootstrap import KEYS_FILE, MANIFEST_FILE, pack, pack_manifest
from evenhand_policy.config import KvCacheShare, PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.push_document import DocumentRejectedError, body_digest, encode_document, understood_members
from evenhand_policy.push_protocol import (
    CONFIG_PATH,
    POD_TOKEN_HEADER,
    REPORT_PATH,
    SIGNATURE_HEADER,
    ConfigSource,
    EngineReport,
    is_answer_signed,
    make_request,
    sign_request,
)
from evenhand_policy.signatures import write_key_set
from evenhand_policy.version import Assignment, Version

KEY, NEXT_KEY, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([index]) * 32) for index in (1, 2, 3))
POOL = PoolReference(namespace="inference", name="default")
UID = "uid-of-this-pod"


def document(**changes: Any) -> SchedulerConfig:
    tenants = changes.pop("tenants", (TenantConfig(tenant_id="chat", weight=4),))
    return SchedulerConfig(**({"cluster": "c1", "pool": POOL, "tenants": tenants} | changes))


CHAT = document()


class Engine:
    """A receiver in a bare application; `enforced` is what it was told to enforce, in order, `ailment` what is wrong."""

    def __init__(self, folder: Path, apply: Callable[[SchedulerConfig, int], None] | None = None) -> None:
        self.folder = folder
        self.enforced: list[tuple[SchedulerConfig, int]] = []
        self.now = time.time()
        self.ailment: str | None = None
        self._also = apply
        (folder / "bootstrap").mkdir(exist_ok=True)
        if not (folder / "bootstrap" / KEYS_FILE).exists():
            self.trust(KEY)
        claims = {"kubernetes.io": {"pod": {"uid": UID}}}
        (folder / "token").write_text(jwt.encode(claims, STRANGER, algorithm="EdDSA"))
        settings = PushSettings(POOL, folder / "bootstrap", folder / "token", folder / "state" / "last-good.json")
        self.receiver = PushReceiver(settings, self._apply, ailment=lambda: self.ailment, clock=lambda: self.now)

    def trust(self, *keys: Ed25519PrivateKey) -> None:
        (self.folder / "bootstrap" / KEYS_FILE).write_bytes(write_key_set([key.public_key() for key in keys]))

    def _apply(self, offered: StoredConfig) -> None:
        num_replicas = offered.assignment.num_replicas
        if self._also:
            self._also(offered.config, num_replicas)
        self.enforced.append((offered.config, num_replicas))

    @property
    def version(self) -> Version:
        return self.receiver.in_force.assignment.version

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

    def sign(self, verb: str, assignment: Assignment, key: Ed25519PrivateKey = KEY, **changes: Any) -> dict[str, str]:
        """Headers of a request to this pod; `changes` are made before it is signed."""
        request = make_request(verb, UID, self.now, cluster="c1", pool=POOL, assignment=assignment)
        return sign_request(key, msgspec.structs.replace(request, **changes))

    async def put(
        self,
        config: SchedulerConfig | bytes = CHAT,
        revision: int = 1,
        epoch: int = 1,
        *,
        num_replicas: int = 1,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        method: str = "PUT",
        key: Ed25519PrivateKey = KEY,
        **changes: Any,
    ) -> tuple[int, EngineReport]:
        if isinstance(config, bytes):
            digest, compressed = body_digest(config), zlib.compress(config)
        else:
            made = encode_document(config)
            digest, compressed = made.digest, made.compressed
        assignment = Assignment(Version(epoch, revision), digest, num_replicas)
        sent = headers or self.sign(method, assignment, key, **changes)
        data = (compressed if body is None else body) if method == "PUT" else None
        async with self.client.request(method, CONFIG_PATH, data=data, headers=sent) as response:
            answer = await response.read()
            signature = response.headers.get(SIGNATURE_HEADER, "")
            if signature:
                nonce = jwt.decode(sent["Authorization"].split()[1], options={"verify_signature": False})["jti"]
                assert is_answer_signed(self.receiver.boot_id, nonce, response.status, answer, signature)
            return response.status, msgspec.json.decode(answer, type=EngineReport if signature else Any)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    async with Engine(tmp_path) as engine:
        yield engine


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


async def test_unknown_key_is_refused_and_answered_unsigned(engine: Engine) -> None:
    status, answer = await engine.put(key=STRANGER)
    assert status == 401
    assert set(answer) == {"problem"}
    assert engine.enforced == []


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer x", "Bearer a.b.c", "Basic eDp5", "Bearer " + "x" * 5000, "Bearer \xe4.\xe4.\xe4"],
)
async def test_what_is_not_signed_is_refused(engine: Engine, authorization: str) -> None:
    status, _ = await engine.put(headers={"Authorization": authorization})
    assert status == 401
    assert engine.enforced == []


async def test_nothing_that_is_signed_can_be_changed(engine: Engine) -> None:
    signed = engine.sign("PUT", Assignment(Version(1, 1), encode_document(CHAT).digest, 1))["Authorization"]
    header, claims, signature = signed.removeprefix("Bearer ").split(".")
    changed = base64.urlsafe_b64decode(claims + "==").replace(b'"replicas":1', b'"replicas":9')
    forged = base64.urlsafe_b64encode(changed).decode().rstrip("=")
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    for token in (f"{header}.{forged}.{signature}", f"{unsigned}.{claims}.", f"{header}.{claims}.{signature[:-4]}AAAA"):
        assert (await engine.put(headers={"Authorization": f"Bearer {token}"}))[0] == 401
    assert engine.enforced == []


async def test_secret_key_cannot_be_made_of_the_public_one(engine: Engine) -> None:
    """A token signed by HMAC with what every pod knows."""
    public = KEY.public_key().public_bytes_raw()
    request = make_request(
        "PUT",
        UID,
        engine.now,
        cluster="c1",
        pool=POOL,
        assignment=Assignment(Version(1, 1), encode_document(CHAT).digest, 1),
    )
    token = jwt.encode(msgspec.to_builtins(request), public, algorithm="HS256")
    assert (await engine.put(headers={"Authorization": f"Bearer {token}"}))[0] == 401


async def test_body_is_the_one_that_was_signed(engine: Engine) -> None:
    status, report = await engine.put(body=encode_document(document(tenants=())).compressed)
    assert (status, report.problem) == (422, "the content is not that of its digest")
    assert engine.enforced == []


async def test_bomb_does_not_go_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenhand_policy.push_document.MAX_DOCUMENT_BYTES", 1000)
    status, report = await engine.put(body=zlib.compress(b"0" * 100_000_000))
    assert (status, report.problem) == (422, "the content is not that of its digest")
    assert (await engine.put(body=b"no zlib at all"))[0] == 422


async def test_request_cannot_be_replayed(engine: Engine) -> None:
    headers = engine.sign("PUT", Assignment(Version(1, 1), encode_document(CHAT).digest, 1))
    assert (await engine.put(headers=headers))[0] == 200
    status, answer = await engine.put(headers=headers)
    assert (status, answer) == (401, {"problem": "the request was sent before"})
    engine.now += 119  # its nonce is remembered for as long as its time is believed
    assert (await engine.put(headers=headers))[0] == 401


async def test_request_to_another_pod_is_refused(engine: Engine) -> None:
    status, answer = await engine.put(aud="uid-of-another-pod")
    assert (status, answer) == (401, {"problem": "the request is for another pod"})
    assert engine.enforced == []


@pytest.mark.parametrize(("skew", "status"), [(-59, 200), (59, 200), (-61, 401), (61, 401), (float("nan"), 401)])
async def test_request_is_of_now(engine: Engine, skew: float, status: int) -> None:
    answered, report = await engine.put(iat=engine.now + skew)
    assert answered == status
    if skew == 61:
        assert report.problem == "its time is more than 60 s from this engine's clock", (
            "the same words at every attempt"
        )


@pytest.mark.parametrize("change", [{"method": "GET"}, {"method": "PATCH"}, {"path": REPORT_PATH}])
async def test_signature_of_another_request_is_none_of_a_put(engine: Engine, change: dict[str, str]) -> None:
    headers = engine.sign("PUT", Assignment(Version(1, 1), encode_document(CHAT).digest, 1), **change)
    assert (await engine.put(headers=headers))[0] == 401


async def test_keys_are_rotated_without_a_restart(engine: Engine) -> None:
    engine.trust(KEY, NEXT_KEY)
    assert (await engine.put(CHAT, 1, key=KEY))[0] == 200
    assert (await engine.put(CHAT, 2, key=NEXT_KEY))[0] == 200
    engine.trust(NEXT_KEY)
    assert (await engine.put(CHAT, 3, key=KEY))[0] == 401
    assert (await engine.put(CHAT, 3, key=NEXT_KEY))[0] == 200


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"keys": [{}]}', b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', b"\xff"]
)
async def test_pod_that_knows_no_key_believes_nobody(engine: Engine, content: bytes) -> None:
    (engine.folder / "bootstrap" / KEYS_FILE).write_bytes(content)
    assert (await engine.put())[0] == 401


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


async def test_restarted_pod_has_its_last_good_config(engine: Engine) -> None:
    await engine.put(CHAT, 7, num_replicas=3)
    file = engine.folder / "state" / "last-good.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["last-good.json"]
    again = Engine(engine.folder)
    assert again.enforced == [(CHAT, 3)]
    assert again.receiver.in_force.source is ConfigSource.LAST_GOOD
    assert again.receiver.boot_id != engine.receiver.boot_id
    async with again:
        assert (await again.put(CHAT, 6))[0] == 409
        assert (await again.put(CHAT, 7, num_replicas=3))[0] == 200


async def test_what_the_engine_is_not_well_with_is_not_started_with_again(engine: Engine) -> None:
    """Else a document that it dies of would kill it at every start."""
    await engine.put(CHAT, 7)
    engine.ailment = "the core does not enforce it"
    status, report = await engine.put(document(tenants=()), 8)
    assert (status, report.ailment) == (200, "the core does not enforce it")
    assert Engine(engine.folder).version == (1, 7)
    engine.ailment = None
    async with asyncio.timeout(5):
        while Engine(engine.folder).version != (1, 8):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace(b"chat", b"spam"), lambda _: b""])
async def test_damaged_file_is_left_alone(engine: Engine, damage: Callable[[bytes], bytes]) -> None:
    await engine.put()
    file = engine.folder / "state" / "last-good.json"
    file.write_bytes(damage(file.read_bytes()))
    assert Engine(engine.folder).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_pod_that_cannot_save_still_enforces(engine: Engine) -> None:
    (engine.folder / "state").write_text("a file where the folder should be")
    assert (await engine.put())[0] == 200
    assert engine.enforced[-1][0] == CHAT


def mount_bootstrap(folder: Path, revision: int, config: SchedulerConfig = CHAT, key: Ed25519PrivateKey = KEY) -> None:
    made = encode_document(config)
    files = pack_manifest(
        key,
        (KEY.public_key(),),
        cluster=config.cluster,
        pool=config.pool or POOL,
        assignment=Assignment(Version(1, revision), made.digest, 4),
        parts=pack(made),
    )
    for part in pack(made):
        files |= part
    for name, content in files.items():
        (folder / "bootstrap" / name).write_bytes(content)


async def test_new_pod_starts_with_the_mounted_document(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9)
    engine = Engine(tmp_path)
    assert engine.enforced == [(CHAT, 4)]
    assert engine.receiver.in_force.source is ConfigSource.BOOTSTRAP


@pytest.mark.parametrize(("mounted", "saved", "expected"), [(9, 7, 9), (7, 9, 9)])
async def test_newest_of_what_is_stored_is_enforced(engine: Engine, mounted: int, saved: int, expected: int) -> None:
    await engine.put(CHAT, saved)
    mount_bootstrap(engine.folder, mounted)
    assert Engine(engine.folder).version == (1, expected)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "part-0").unlink(),
        lambda folder: (folder / "part-0").write_bytes(b"of another document"),
        lambda folder: (folder / MANIFEST_FILE).unlink(),
        lambda folder: (folder / MANIFEST_FILE).write_bytes(b"a.b.c"),
        lambda folder: (folder / MANIFEST_FILE).write_bytes((folder / MANIFEST_FILE).read_bytes()[:-5] + b"AAAAA"),
    ],
)
async def test_incomplete_or_forged_set_is_not_loaded(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9)
    spoil(tmp_path / "bootstrap")
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_pool_of_which_nothing_is_stored_yet_is_nothing_to_warn_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN
    assert caplog.records == []


async def test_volume_that_is_replaced_while_it_is_read_is_read_of_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(tmp_path)
    folder = tmp_path / "bootstrap"
    for name, tenants in (("..old", 1), ("..new", 2)):
        mount_bootstrap(tmp_path, tenants, document(tenants=(TenantConfig(tenant_id=f"t{tenants}"),)))
        (folder / name).mkdir()
        for path in [path for path in folder.iterdir() if path.is_file()]:
            shutil.copy(path, folder / name / path.name)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.unlink()
        path.symlink_to(f"..data/{path.name}")
    (folder / "..data").symlink_to("..old")
    read_file = config_store._read_file

    def replace_meanwhile(path: Path, limit: int) -> bytes:
        content = read_file(path, limit)
        if (folder / "..old").exists():
            (folder / "..moved").symlink_to("..new")
            (folder / "..moved").replace(folder / "..data")
            shutil.rmtree(folder / "..old")
        return content

    monkeypatch.setattr(config_store, "_read_file", replace_meanwhile)
    assert Engine(tmp_path).version == (1, 2)


async def test_set_signed_with_a_stranger_key_is_not_loaded(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9, key=STRANGER)
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


async def test_stored_config_of_another_pool_is_not_enforced(tmp_path: Path) -> None:
    Engine(tmp_path)
    mount_bootstrap(tmp_path, 9, document(pool=PoolReference(namespace="inference", name="other")))
    assert Engine(tmp_path).receiver.in_force.source is ConfigSource.BUILT_IN


NOTHING = Assignment(Version(1, 1), "", 1)


async def test_signed_get_tells_what_is_in_force_and_proves_where(engine: Engine) -> None:
    await engine.put(CHAT, 3)
    async with engine.client.get(REPORT_PATH, headers=engine.sign("GET", NOTHING)) as response:
        report = msgspec.json.decode(await response.read(), type=EngineReport)
        assert response.headers[POD_TOKEN_HEADER] == (engine.folder / "token").read_text()
    assert report.revision == 3
    assert set(report.understands) == understood_members()


async def test_token_is_for_the_operator_alone(engine: Engine) -> None:
    async with engine.client.get(REPORT_PATH) as response:
        assert response.status == 200, "it is local"
        assert POD_TOKEN_HEADER not in response.headers
    for headers in (engine.sign("GET", NOTHING, STRANGER), engine.sign("GET", NOTHING, aud="uid-of-another-pod")):
        async with engine.client.get(REPORT_PATH, headers=headers) as response:
            assert response.status == 401
            assert POD_TOKEN_HEADER not in response.headers


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_local(address: str) -> None:
    assert is_local(request_from(address))


def test_a_web_page_that_rebinds_its_name_to_this_machine_is_not() -> None:
    request = request_from("127.0.0.1").clone(headers={"Host": "attacker.example"})
    assert not is_local(request)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "forwarded", "Via", "x-forwarded-client-cert"])
def test_what_a_proxy_on_this_machine_passes_on_is_not(header: str) -> None:
    request = request_from("127.0.0.1").clone(headers={"Host": "localhost:9000", header: "x"})
    assert not is_local(request)


@pytest.mark.parametrize("address", ["127.0.0.6", "10.0.0.1", "192.168.1.1", "fe80::1", "", "nonsense"])
def test_others_are_not(address: str) -> None:
    """A sidecar of Istio's hands on everybody's connections from 127.0.0.6."""
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
    assert await get(REPORT_PATH, engine.sign("GET", NOTHING)) == 200
    assert await get("/debug", engine.sign("GET", NOTHING, path="/debug")) == 200
    assert await get("/debug?x=1", engine.sign("GET", NOTHING, path="/debug")) == 401
