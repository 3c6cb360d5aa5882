"""Stand-ins for engine pods: the engine's own admin code, and servers that behave as no engine should."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import kopf
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import ConfigDocument, LastGoodFile
from evenhand_engine.frontend.push_receiver import PushReceiver, PushSettings
from evenhand_operator.cache import Cache
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.kube import KubeClient
from evenhand_operator.objects import EnginePod
from evenhand_operator.offer import Offer
from evenhand_operator.pod_prover import PodProver
from evenhand_operator.pusher import Pusher
from evenhand_policy.bootstrap import KEYS_FILE
from evenhand_policy.compact import Members
from evenhand_policy.config import PoolReference, SchedulerConfig, ServiceAccountIssuer, TenantConfig
from evenhand_policy.push_document import encode_document
from evenhand_policy.push_protocol import POD_TOKEN_AUDIENCE, ConfigSource
from evenhand_policy.signatures import write_key_set
from evenhand_policy.version import Version
from harness.builders import Notices
from harness.fake_api_server import ApiServer
from harness.term_api import TermApi
from harness.virtual_time import VirtualTime

KEY = Ed25519PrivateKey.from_private_bytes(b"operator" * 4)
ISSUER_KEY = Ed25519PrivateKey.from_private_bytes(b"cluster." * 4)
ISSUER = ServiceAccountIssuer(
    issuer="https://cluster",
    audience="",
    jwks={"keys": [OKPAlgorithm.to_jwk(ISSUER_KEY.public_key(), as_dict=True) | {"kid": "k"}]},
)
POOL = PoolReference(namespace="inference", name="default")


def make_offer(
    revision: int = 1, *, epoch: int = 1, num_replicas: int = 1, understood: Members | None = None, **tenant: Any
) -> Offer:
    """What a leader would offer to the pods of `POOL`."""
    tenants = (TenantConfig(tenant_id="chat", **({"weight": 4} | tenant)),)
    config = SchedulerConfig(cluster="c1", pool=POOL, tenants=tenants)
    return Offer("c1", POOL, encode_document(config, understood), Version(epoch, revision), num_replicas)


def make_pod(
    name: str, url: str = "http://127.0.0.1:1", *, restarts: int = 0, started_at: float = 0.0, ready: bool = True
) -> EnginePod:
    """A pod of `POOL`."""
    return EnginePod(
        key=(POOL.namespace, name),
        uid=f"uid-{name}",
        labels={},
        url=url,
        instance=f"uid-{name}/{restarts}",
        started_at=started_at,
        ready_since=0.0 if ready else None,
    )


def make_pod_token(uid: str, key: Ed25519PrivateKey = ISSUER_KEY, **claims: Any) -> str:
    """A projected token of the pod with that uid, as the cluster issues it."""
    bound = {"namespace": POOL.namespace, "pod": {"name": uid.removeprefix("uid-"), "uid": uid}}
    now = time.time()
    content = {"iss": ISSUER.issuer, "aud": [POD_TOKEN_AUDIENCE], "sub": "system:serviceaccount:inference:engine"}
    content |= {"iat": int(now), "exp": int(now) + 3600, "kubernetes.io": bound} | claims
    return jwt.encode(content, key, algorithm="EdDSA", headers={"kid": "k"})


class EngineStandIn:
    """The engine's real admin code on a port of its own, in the pod `name`.

    `enforced` is what it was told to enforce, in order, `requests` the methods of what it was asked; `ailment` is what is
    wrong with it.
    """

    def __init__(self, folder: Path, name: str = "pod-0", key: Ed25519PrivateKey = KEY) -> None:
        self.folder = folder / "mounted"
        self.folder.mkdir(parents=True)
        self.trust(key)
        token = folder / "token"
        token.write_text(make_pod_token(f"uid-{name}"))
        self._settings = PushSettings(POOL, self.folder, token, last_good=folder / "last-good.json")
        self.last_good = folder / "last-good.json"
        self.enforced: list[tuple[SchedulerConfig, int]] = []
        self.requests: list[str] = []
        self.ailment: str | None = None
        self.backend = "vllm"
        self.url = ""
        self.restart()

    def trust(self, *keys: Ed25519PrivateKey) -> None:
        """What is mounted says to believe these."""
        (self.folder / KEYS_FILE).write_bytes(write_key_set([key.public_key() for key in keys]))

    def restart(self) -> None:
        """As if the process had been killed and started."""
        built_in = ConfigDocument.unversioned(SchedulerConfig(), ConfigSource.BUILT_IN)
        in_force = ConfigInForce(built_in, LastGoodFile(self.last_good))
        in_force.on_change(self._enforce)
        self.receiver = PushReceiver(
            self._settings, in_force, ailment=lambda: self.ailment, backend=lambda: self.backend
        )

    def _enforce(self, offered: ConfigDocument) -> None:
        self.enforced.append((offered.config, offered.assignment.num_replicas))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The admin port."""
        self.requests.append(request.method)
        receiver = self.receiver
        return await (receiver.show_report(request) if request.method == "GET" else receiver.put_config(request))

    @property
    def revision(self) -> int:
        """Of what is in force."""
        return self.receiver.in_force.assignment.version.revision


Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(handle: Handle) -> AsyncIterator[str]:
    """A server on a free port; yields its URL."""
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield site.name if not site.name.endswith(":0") else f"http://127.0.0.1:{_port(runner)}"
    finally:
        await runner.cleanup()


def _port(runner: web.AppRunner) -> int:
    return int(runner.addresses[0][1])


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handle], Awaitable[str]]]:
    """Starts servers that the test's end stops."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(handle: Handle) -> str:
            return await stack.enter_async_context(serving(handle))

        yield start


@pytest.fixture
async def engine(tmp_path: Path, serve: Callable[[Handle], Awaitable[str]]) -> Callable[..., Awaitable[EngineStandIn]]:
    """Starts engine stand-ins."""

    async def start(name: str = "pod-0", key: Ed25519PrivateKey = KEY) -> EngineStandIn:
        stand_in = EngineStandIn(tmp_path / name, name, key)
        stand_in.url = await serve(stand_in.handle)
        return stand_in

    return start


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    """The operator's way to its pods, with the patience that a busy test machine needs."""
    client = EngineClient(lambda: KEY, PodProver(lambda: ISSUER), request_seconds=60)
    yield client
    await client.close()


@pytest.fixture
async def hasty_client() -> AsyncIterator[EngineClient]:
    """The same with little patience."""
    client = EngineClient(lambda: KEY, PodProver(lambda: ISSUER), request_seconds=0.3)
    yield client
    await client.close()


class Changes:
    """Counts notifications and lets a test wait for what they bring."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Condition()

    def notify(self, *_: object) -> None:
        """To be called on a change."""
        self.count += 1
        asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool], timeout: float = 120) -> None:
        """Returns once it holds, looked at after every change and now and then."""
        async with asyncio.timeout(timeout), self._changed:
            while not holds():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 0.02)


@pytest.fixture
def make() -> SimpleNamespace:
    """The helpers of this file, for test modules, which cannot import it."""
    return SimpleNamespace(offer=make_offer, pod=make_pod, pod_token=make_pod_token, key=KEY, issuer=ISSUER)


@pytest.fixture
def virtual_time() -> Iterator[VirtualTime]:
    """For tests of what happens when: waiting takes no time."""
    with VirtualTime() as time:
        yield time


@pytest.fixture
def changes() -> Changes:
    """Notifications of one test."""
    return Changes()


@pytest.fixture
def api() -> ApiServer:
    """An API server of one test."""
    return ApiServer()


@pytest.fixture
async def kube(api: ApiServer, serve: Callable[[Handle], Awaitable[str]]) -> AsyncIterator[KubeClient]:
    """A client of `api`."""
    server = await serve(api.handle)
    tokens = iter(["first", "second", "second"])
    client = KubeClient(lambda: kopf.ConnectionInfo(server=server, token=next(tokens)))
    yield client
    await client.close()


@pytest.fixture
def deleted() -> set[str]:
    """Uids of pods that there are no more."""
    return set()


@pytest.fixture
async def pusher(
    client: EngineClient, changes: Changes, deleted: set[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pusher]:
    """Of one pool; it has short patience with the first pod and with one that refuses."""
    monkeypatch.setattr("evenhand_operator.pod_link.TRIAL_SECONDS", 0.01)
    monkeypatch.setattr("evenhand_operator.pod_link.FIRST_BACKOFF_SECONDS", 0.01)
    async with asyncio.TaskGroup() as tasks:
        pusher = Pusher(client, tasks, changes.notify, lambda uid: uid not in deleted)
        yield pusher
        pusher.drop((POOL.namespace, POOL.name))


@pytest.fixture
def notices() -> Notices:
    """What the cache of one test tells."""
    return Notices()


@pytest.fixture
def cache(notices: Notices) -> Cache:
    """An empty one."""
    return Cache(notices)


@pytest.fixture
async def term_api(changes: Changes) -> TermApi:
    """What the terms of one test work with: a pool, and nothing else yet."""
    api = TermApi(changes, KEY)
    api.store("EnginePool", "default", selector={"matchLabels": {"app": "engine"}})
    return api
