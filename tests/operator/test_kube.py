"""The operator's own requests, against a server that answers as an API server may."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kopf
import pytest
from aiohttp import web

from evenhand_operator.cache import Cache
from evenhand_operator.kube import ENGINE_POOLS, TENANT_POLICIES, ApiError, KubeClient
from evenhand_operator.lister import Lister
from evenhand_operator.settings import Settings

Json = dict[str, Any]
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]


def policy(name: str, version: int, secret: str = "") -> Json:
    identities = [{"name": "k", "type": "APIKey", "apiKey": {"secretRef": {"name": secret}}}] if secret else []
    metadata = {
        "name": name,
        "namespace": "n",
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    spec = {"identities": identities}
    return {"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy", "metadata": metadata, "spec": spec}


class ApiServer:
    """Answers lists from `objects` by path, two to a page, and refuses while `refusals` lasts."""

    def __init__(self) -> None:
        self.version = 50
        self.later = ""  # path of lists that are of version 60
        self.objects: dict[str, list[Json]] = {}
        self.refusals: list[tuple[int, Json, dict[str, str]]] = []
        self.requests: list[web.Request] = []
        self.token = "first"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"message": "Unauthorized"}, status=401)
        if self.refusals:
            status, body, headers = self.refusals.pop(0)
            return web.json_response(body, status=status, headers=headers)
        if request.method != "GET":
            return web.json_response(json.loads(await request.text()))
        found = self.objects.get(request.path.rpartition("/")[2], [])
        start = int(request.query.get("continue", "0"))
        is_later = self.later and self.later in request.path
        metadata = {"resourceVersion": "60" if is_later else str(self.version)}
        if start + 2 < len(found):
            metadata["continue"] = str(start + 2)
        return web.json_response({"metadata": metadata, "items": found[start : start + 2]})


@pytest.fixture
def api() -> ApiServer:
    return ApiServer()


@pytest.fixture
async def kube(api: ApiServer, serve: Serve) -> Any:
    server = await serve(api.handle)
    tokens = iter(["first", "second", "second"])
    client = KubeClient(lambda: kopf.ConnectionInfo(server=server, token=next(tokens)))
    yield client
    await client.close()


async def test_renewed_token_is_taken_once_the_old_one_is_refused(api: ApiServer, kube: KubeClient) -> None:
    await kube.get(ENGINE_POOLS, "n", "a")
    api.token = "second"
    await kube.get(ENGINE_POOLS, "n", "a")
    assert len(api.requests) == 3
    api.token = "third"
    with pytest.raises(ApiError, match="Unauthorized") as caught:
        await kube.get(ENGINE_POOLS, "n", "a")
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("status", "headers", "is_transient", "retry_after"),
    [
        (403, {}, False, 0),
        (404, {}, False, 0),
        (409, {}, False, 0),
        (429, {"Retry-After": "3"}, True, 3),
        (500, {}, True, 0),
        (503, {"Retry-After": "soon"}, True, 0),
    ],
)
async def test_refusal_says_what_and_whether_to_try_again(
    api: ApiServer, kube: KubeClient, status: int, headers: dict[str, str], is_transient: bool, retry_after: float
) -> None:
    api.refusals.append((status, {"message": "not today"}, headers))
    with pytest.raises(ApiError, match=rf"{status}: GET /apis/evenhand.dev/.*/n/enginepools/a: not today") as caught:
        await kube.get(ENGINE_POOLS, "n", "a")
    assert (caught.value.is_transient, caught.value.retry_after) == (is_transient, retry_after)


async def test_server_that_is_away_is_transient(unused_tcp_port: int) -> None:
    info = kopf.ConnectionInfo(server=f"http://127.0.0.1:{unused_tcp_port}", token="t")
    client = KubeClient(lambda: info)
    with pytest.raises(ApiError) as caught:
        await client.get(ENGINE_POOLS, "n", "a")
    assert (caught.value.status, caught.value.is_transient) == (0, True)
    await client.close()


async def test_status_is_applied_as_its_field_manager_and_with_its_kind(api: ApiServer, kube: KubeClient) -> None:
    obj = {"metadata": {"name": "a", "namespace": "n"}, "status": {"observedGeneration": 1}}
    assert (await kube.apply(TENANT_POLICIES, obj, "status"))["kind"] == "TenantPolicy"
    [request] = api.requests
    assert (request.method, request.path.rpartition("/")[2]) == ("PATCH", "status")
    assert dict(request.query) == {"fieldManager": "evenhand-operator", "force": "true"}
    assert request.headers["Content-Type"] == "application/apply-patch+yaml"


# ---- lists


class Notices:
    """What the cache needs."""

    def documents_changed(self) -> None: ...
    def pods_changed(self) -> None: ...
    def statuses_changed(self) -> None: ...
    def gap_seen(self) -> None: ...


@pytest.fixture
def cache() -> Cache:
    return Cache(Notices())


def names(cache: Cache) -> set[str]:
    return {each.key[1] for each in cache.policies}


async def test_every_page_is_read_and_what_no_page_has_is_dropped(
    api: ApiServer, kube: KubeClient, cache: Cache
) -> None:
    cache.policies.observe("ADDED", policy("gone", 3))
    cache.policies.observe("ADDED", policy("newer-than-the-list", 51))
    api.objects["tenantpolicies"] = [policy(f"p{index}", 10 + index) for index in range(5)]
    await Lister(kube, cache, Settings()).list_all()
    assert names(cache) == {f"p{index}" for index in range(5)} | {"newer-than-the-list"}


async def test_policy_deleted_between_our_list_and_that_of_the_watch_is_dropped(
    api: ApiServer, kube: KubeClient, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evenhand_operator.lister._GAP_QUIET_SECONDS", 0.01)
    api.objects["tenantpolicies"] = [policy("kept", 1), policy("deleted-since", 2)]
    lister, listed = Lister(kube, cache, Settings()), asyncio.Event()
    await (list_all := lister.list_all)()
    del api.objects["tenantpolicies"][1]
    assert not lister.caught_up.is_set(), "the watch has not begun"

    async def list_and_tell() -> None:
        await list_all()
        listed.set()

    monkeypatch.setattr(lister, "list_all", list_and_tell)
    running = asyncio.create_task(lister.run())
    lister.gap_seen()  # Kopf tells what it has found
    async with asyncio.timeout(5):
        await listed.wait()
    running.cancel()
    assert names(cache) == {"kept"}
    assert lister.caught_up.is_set()


async def test_a_while_after_every_gap_it_is_listed_once_more(
    kube: KubeClient, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kopf says nothing of a kind of which it finds no object any more."""
    lister, pauses = Lister(kube, cache, Settings(relist_seconds=300)), list[float]()

    async def wait(timeout: float) -> float | None:
        pauses.append(timeout)
        return 1.0 if len(pauses) == 2 else None

    async def list_all() -> None:
        if len(pauses) == 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(lister, "_gap", SimpleNamespace(wait=wait))
    monkeypatch.setattr(lister, "list_all", list_all)
    with pytest.raises(asyncio.CancelledError):
        await lister.run()
    assert pauses == [30, 300, 30, 300], "the start is a gap too, and the second wait ends with one"


async def test_named_secrets_are_listed_with_the_rest(api: ApiServer, kube: KubeClient, cache: Cache) -> None:
    secret = {"metadata": {"name": "keys", "namespace": "n", "uid": "s", "resourceVersion": "4"}, "data": {}}
    api.objects["tenantpolicies"] = [policy("a", 1, "keys"), policy("b", 2, "missing")]
    api.objects["secrets"] = [secret, secret | {"metadata": secret["metadata"] | {"name": "unrelated"}}]
    await Lister(kube, cache, Settings()).list_all()
    assert set(cache.secrets.found) == {("n", "keys")}
    assert cache.secrets.want([("n", "keys"), ("n", "missing")]) == set(), "that one is missing is known"


async def test_served_namespaces_are_listed_one_by_one(api: ApiServer, kube: KubeClient, cache: Cache) -> None:
    await Lister(kube, cache, Settings(namespaces=("x", "y"), pod_selector="app=engine")).list_all()
    paths = [request.path for request in api.requests]
    assert all("/namespaces/x/" in path or "/namespaces/y/" in path for path in paths)
    assert sum(path.endswith("/tenantpolicies") for path in paths) == 2
    pods = [request for request in api.requests if request.path.endswith("/pods")]
    assert {request.query["labelSelector"] for request in pods} == {"app=engine"}


async def test_what_is_newer_than_the_first_of_several_lists_is_kept(
    api: ApiServer, kube: KubeClient, cache: Cache
) -> None:
    cache.policies.observe("ADDED", policy("born-since", 55))
    api.later = "/namespaces/y/"
    await Lister(kube, cache, Settings(namespaces=("x", "y"))).list_all()
    assert names(cache) == {"born-since"}


async def test_list_is_tried_until_it_succeeds(
    api: ApiServer, kube: KubeClient, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    api.objects["tenantpolicies"] = [policy("a", 1)]
    api.refusals = [(404, {"message": "the server could not find the requested resource"}, {})]
    await Lister(kube, cache, Settings(namespaces=("n",))).list_all()
    assert names(cache) == {"a"}
    assert "kubectl apply -f crds/" in caplog.text


async def test_secret_that_is_read_and_not_there_is_known_to_be_absent(
    api: ApiServer, kube: KubeClient, cache: Cache
) -> None:
    wanted = cache.secrets.want([("n", "missing")])
    api.refusals = [(404, {"message": "not found"}, {})]
    await Lister(kube, cache, Settings()).read_secrets(wanted)
    assert cache.secrets.want([("n", "missing")]) == set()
    api.refusals = [(500, {"message": "etcd is away"}, {})]
    with pytest.raises(ApiError, match="etcd is away"):
        await Lister(kube, cache, Settings()).read_secrets(cache.secrets.want([("n", "missing"), ("n", "other")]))


def test_kubeconfig_without_credentials_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evenhand_operator.login import LoginError, log_in

    path = tmp_path / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    content = {
        "clusters": [cluster],
        "contexts": [context],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    path.write_text(json.dumps(content))
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(LoginError, match="kubectl create token"):
        log_in()
    path.write_text("{")
    with pytest.raises(LoginError, match="cannot be used"):
        log_in()
