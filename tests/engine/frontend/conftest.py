"""A receiver of pushes in a bare application, and what the operator would send to it."""

import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import ConfigDocument, LastGoodFile
from evenhand_engine.frontend.push_receiver import PushReceiver, PushSettings
from evenhand_policy.bootstrap import KEYS_FILE
from evenhand_policy.config import PoolReference, SchedulerConfig, TenantConfig
from evenhand_policy.push_document import body_digest, encode_document
from evenhand_policy.push_protocol import (
    CONFIG_PATH,
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
        built_in = ConfigDocument.unversioned(SchedulerConfig(), ConfigSource.BUILT_IN)
        in_force = ConfigInForce(built_in, LastGoodFile(folder / "state" / "last-good.json"))
        in_force.on_change(self._enforce)
        self.receiver = PushReceiver(settings, in_force, ailment=lambda: self.ailment, clock=lambda: self.now)

    def trust(self, *keys: Ed25519PrivateKey) -> None:
        (self.folder / "bootstrap" / KEYS_FILE).write_bytes(write_key_set([key.public_key() for key in keys]))

    def _enforce(self, offered: ConfigDocument) -> None:
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
