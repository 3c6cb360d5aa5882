"""Lists and watches: what is in the cache is what there is, whatever one namespace or one connection does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from evenhand_operator import lister as lister_module
from evenhand_operator import reflector as reflector_module
from evenhand_operator.cache import Cache
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.lister import Lister
from evenhand_operator.settings import Settings
from evenhand_policy.secret import API_KEYS_TYPE
from harness.builders import Notices, make_namespace, make_policy, make_pool, make_secret

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector_module, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(reflector_module, "_LONGEST_PAUSE_SECONDS", 0.02)


class _Over(Exception):
    """Ends what runs in the background."""


@contextlib.asynccontextmanager
async def running(lister: Lister) -> AsyncIterator[asyncio.TaskGroup]:
    """Started, so that everything was listed."""
    with contextlib.suppress(*[_Over]):
        try:
            async with asyncio.TaskGroup() as tasks:
                await asyncio.wait_for(lister.start(tasks), 120)
                yield tasks
                raise _Over
        except* _Over:
            pass


def policy(name: str, version: int, namespace: str = "n") -> Json:
    return make_policy(name, meta={"namespace": namespace, "version": version})


def names(cache: Cache) -> set[str]:
    return {each.key[1] for each in cache.policies}


async def test_every_page_is_read_and_what_no_page_has_is_dropped(api: Any, kube: KubeClient, cache: Cache) -> None:
    cache.policies.observe("ADDED", policy("gone", 3))
    cache.policies.observe("ADDED", policy("newer-than-the-list", 51))
    api.objects["tenantpolicies"] = [policy(f"p{index}", 10 + index) for index in range(5)]
    async with running(Lister(kube, cache, Settings())):
        assert names(cache) == {f"p{index}" for index in range(5)} | {"newer-than-the-list"}


# ---- namespaces


async def test_served_namespaces_are_listed_one_by_one(api: Any, kube: KubeClient, cache: Cache) -> None:
    async with running(Lister(kube, cache, Settings(namespaces=("x", "y"), pod_selector="app=engine"))):
        listed = [request for request in api.requests if "watch" not in request.query]
    paths = [request.path for request in listed]
    assert all("/namespaces/x/" in path or "/namespaces/y/" in path for path in paths)
    assert sum(path.endswith("/tenantpolicies") for path in paths) == 2
    pod_lists = [request for request in listed if request.path.endswith("/pods")]
    assert {request.query["labelSelector"] for request in pod_lists} == {"app=engine"}


async def test_namespace_that_cannot_be_read_holds_up_no_other(
    api: Any, kube: KubeClient, cache: Cache, notices: Notices, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its RoleBinding went first when it was deleted."""
    monkeypatch.setattr(reflector_module, "_FORBIDDEN_SECONDS", 0.05)
    api.objects |= {"x/tenantpolicies": [policy("a", 1, "x")], "y/tenantpolicies": [policy("b", 2, "y")]}
    api.forbidden = {"y"}
    lister = Lister(kube, cache, Settings(namespaces=("x", "y")))
    async with running(lister):
        assert cache.unreadable == {"y"}
        assert lister.readable_namespaces == ("x",)
        assert [each.key for each in cache.readable_policies()] == [("x", "a")]
        await asyncio.wait_for(lister.list_resources(), 120)
        notices.take()
        api.forbidden = set()
        await changes.until(lambda: not cache.unreadable)
        assert {each.key for each in cache.readable_policies()} == {("x", "a"), ("y", "b")}
        assert "documents" in notices.take()


async def test_half_a_namespace_is_none(
    api: Any, kube: KubeClient, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools without their policies would be pushed a document without tenants."""
    monkeypatch.setattr(reflector_module, "_FORBIDDEN_SECONDS", 0.0)
    lister = Lister(kube, cache, Settings(namespaces=("x",)))
    async with running(lister):
        assert not cache.unreadable
        lister._resources[0].is_forbidden = True
        lister._access_changed()
        cache.pools.take(make_pool(meta={"namespace": "x", "version": 99}))
        assert cache.readable_pools() == ()


async def test_labels_of_namespaces_are_watched_where_all_are_served(
    api: Any, kube: KubeClient, cache: Cache, changes: Any
) -> None:
    api.objects["namespaces"] = [make_namespace("team", team="gold")]
    async with running(Lister(kube, cache, Settings())):
        assert cache.namespace_labels()["team"]["team"] == "gold"
        api.events["namespaces"].put_nowait({"type": "MODIFIED", "object": make_namespace("team", 60)})
        await changes.until(lambda: "team" not in cache.namespace_labels()["team"])


# ---- policies and pools, which Kopf watches


async def test_change_is_seen_while_kopf_is_still_listing(
    api: Any, kube: KubeClient, cache: Cache, changes: Any
) -> None:
    async with running(Lister(kube, cache, Settings())):
        api.events["tenantpolicies"].put_nowait({"type": "ADDED", "object": policy("new", 60)})
        await changes.until(lambda: names(cache) == {"new"})


async def test_policy_deleted_between_our_list_and_that_of_the_watch_is_dropped(
    api: Any, kube: KubeClient, cache: Cache, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lister_module, "_GAP_QUIET_SECONDS", 0.01)
    api.objects["tenantpolicies"] = [policy("kept", 1), policy("deleted-since", 2)]
    lister = Lister(kube, cache, Settings())
    async with running(lister) as tasks:
        assert not lister.caught_up.is_set(), "Kopf has not begun"
        del api.objects["tenantpolicies"][1]
        tasks.create_task(lister.run())
        lister.gap_seen()  # Kopf tells what it has found
        await asyncio.wait_for(lister.caught_up.wait(), 120)
        assert names(cache) == {"kept"}
        await changes.until(lambda: not api.watched["tenantpolicies"])  # now Kopf does, and nobody else
        assert api.watched["namespaces"] == 1


async def test_a_while_after_every_gap_it_is_listed_once_more(
    kube: KubeClient, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kopf says nothing of a kind of which it finds no object any more."""
    lister, pauses = Lister(kube, cache, Settings(relist_seconds=300)), list[float]()

    async def wait(timeout: float) -> float | None:
        pauses.append(timeout)
        return 1.0 if len(pauses) == 2 else None

    async def list_resources() -> None:
        if len(pauses) == 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(lister, "_gap", SimpleNamespace(wait=wait))
    monkeypatch.setattr(lister, "list_resources", list_resources)
    with pytest.raises(asyncio.CancelledError):
        await lister.run()
    assert pauses == [30, 300, 30, 300], "the start is a gap too, and the second wait ends with one"


# ---- Secrets


def secret(name: str, version: int, **more: Any) -> Json:
    return make_secret(name, f"the-key-in-{name}", namespace="n", version=version, **more)


def secret_requests(api: Any) -> list[str]:
    """Path and selector of each list."""
    return [
        f"{each.path}?{each.query['fieldSelector']}"
        for each in api.requests
        if each.path.endswith("/secrets") and "watch" not in each.query
    ]


async def test_secrets_of_our_type_are_listed_and_no_others(api: Any, kube: KubeClient, cache: Cache) -> None:
    api.objects["secrets"] = [secret("keys", 1, type=API_KEYS_TYPE), secret("unrelated", 2)]
    lister = Lister(kube, cache, Settings())
    async with running(lister):
        await lister.provide_secrets([("n", "keys")])
        assert set(cache.secrets.found) == {("n", "keys")}
        assert secret_requests(api) == [f"/api/v1/secrets?type={API_KEYS_TYPE}"]


async def test_other_secrets_are_watched_in_the_namespaces_that_name_them(
    api: Any, kube: KubeClient, cache: Cache, notices: Notices, changes: Any
) -> None:
    api.objects |= {"secrets": [], "n/secrets": [secret("keys", 4), secret("unrelated", 5)]}
    lister = Lister(kube, cache, Settings())
    async with running(lister):
        await lister.provide_secrets([("n", "keys"), ("n", "missing")])
        assert set(cache.secrets.found) == {("n", "keys")}
        [_, listed] = secret_requests(api)
        assert listed.startswith("/api/v1/namespaces/n/secrets?type!=helm.sh/release.v1,")
        assert cache.secrets.want([("n", "keys"), ("n", "missing")]) == set(), "that one is missing is known"
        notices.take()
        await changes.until(lambda: "n" in lister._secrets)
        api.events["secrets"].put_nowait({"type": "ADDED", "object": secret("missing", 60)})
        api.events["secrets"].put_nowait({"type": "ADDED", "object": secret("missing", 60)})
        await changes.until(lambda: ("n", "missing") in cache.secrets.found)
        assert notices.take() == ["documents"]
        [(_, task)] = lister._secrets.values()
        await lister.provide_secrets([])
        await asyncio.sleep(0)
        assert (lister._secrets, task.cancelling()) == ({}, 1)


async def test_secret_that_was_there_before_it_was_named_is_read(api: Any, kube: KubeClient, cache: Cache) -> None:
    api.objects |= {"secrets": [], "n/secrets": [secret("one", 4)]}
    lister = Lister(kube, cache, Settings())
    async with running(lister):
        await lister.provide_secrets([("n", "one")])
        api.refused = {"/missing": 404, "/other": 500, "/another": 403}
        await lister.provide_secrets([("n", "one"), ("n", "missing")])
        assert cache.secrets.want([("n", "one"), ("n", "missing")]) == set()
        with pytest.raises(ApiError, match="not /other"):
            await lister.provide_secrets([("n", "one"), ("n", "other")])
        await lister.provide_secrets(
            [("n", "one"), ("n", "another")]
        )  # of a namespace that is going: no reason to wait


async def test_secrets_that_are_not_told_of_in_time_are_an_error(
    api: Any, kube: KubeClient, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lister_module, "_FIRST_LIST_SECONDS", 0.05)
    lister = Lister(kube, cache, Settings())
    async with running(lister):
        api.forbidden = {"n"}
        with pytest.raises(ApiError, match="not all Secrets that are named"):
            await lister.provide_secrets([("n", "keys")])
