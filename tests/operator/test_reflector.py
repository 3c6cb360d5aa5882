"""One list and watch: it goes on where it can, begins anew where it must, and says what it may not see."""

import asyncio
from typing import Any

import pytest

from evenhand_operator import reflector as reflector_module
from evenhand_operator.cache import Cache
from evenhand_operator.clock import Clock
from evenhand_operator.kube import KubeClient
from evenhand_operator.reflector import HistoryLostError, Reflector, Scope
from evenhand_operator.resources import PODS
from harness.builders import make_pod


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector_module, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(reflector_module, "_LONGEST_PAUSE_SECONDS", 0.02)


def pods(kube: KubeClient, cache: Cache, **more: Any) -> Reflector:
    return Reflector(kube, Scope(PODS, "n", {}), cache.pods, **more)


def pod(version: int, **more: Any) -> dict[str, Any]:
    return make_pod(namespace="n", version=version, **more)


def pod_versions(cache: Cache) -> list[float | None]:
    return [each.ready_since for each in cache.pods]


async def test_watch_goes_on_where_the_last_one_ended(api: Any, kube: KubeClient, cache: Cache, changes: Any) -> None:
    api.objects["pods"] = [pod(7)]
    task = asyncio.create_task(pods(kube, cache).run())
    events = api.events["pods"]
    await changes.until(lambda: len(api.requests) == 2)
    events.put_nowait({"type": "MODIFIED", "object": pod(60, ready=False)})
    await changes.until(lambda: pod_versions(cache) == [None])
    events.put_nowait({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "75"}}})
    events.put_nowait({"type": "CUT"})
    await changes.until(lambda: len(api.requests) == 3)
    assert api.requests[-1].query["resourceVersion"] == "75"
    events.put_nowait({"type": "DELETED", "object": pod(80)})
    await changes.until(lambda: not list(cache.pods))
    task.cancel()
    assert ["watch" in each.query for each in api.requests] == [False, True, True], "it is listed once"


async def test_forgotten_version_is_listed_anew(api: Any, kube: KubeClient, cache: Cache, changes: Any) -> None:
    """Deletions that nobody told of are seen by the list."""
    api.objects["pods"] = [pod(7)]
    task = asyncio.create_task(pods(kube, cache).run())
    await changes.until(lambda: len(api.requests) == 2)
    api.objects["pods"], api.version = [], 90
    api.events["pods"].put_nowait({"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}})
    await changes.until(lambda: not list(cache.pods))
    task.cancel()


async def test_expired_page_is_no_end(api: Any, kube: KubeClient, cache: Cache) -> None:
    api.objects["pods"] = [pod(7)]
    api.refusals = [(410, {"message": "the provided continue parameter is too old"}, {}), (500, {}, {})]
    assert await pods(kube, cache).list() == 50
    assert len(list(cache.pods)) == 1


async def test_api_server_that_goes_back_in_time_is_not_coped_with(api: Any, kube: KubeClient, cache: Cache) -> None:
    """What is remembered has higher versions than what there is, and would be believed for as long."""
    api.objects["pods"] = [pod(7)]
    reflector = pods(kube, cache)
    for version in (90, 90, 95):
        api.version = version
        assert await reflector.list() == version
    api.version = 94
    with pytest.raises(HistoryLostError, match="listed at version 95, and now at 94"):
        await reflector.list()


async def test_missing_kind_says_what_to_do_and_is_waited_for(
    api: Any, kube: KubeClient, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    api.refusals = [(404, {"message": "the server could not find the requested resource"}, {})]
    await pods(kube, cache).list()
    assert "kubectl apply -f crds/" in caplog.text


async def test_namespace_is_forbidden_only_after_a_while(api: Any, kube: KubeClient, cache: Cache) -> None:
    """An API server that has just started forbids too much."""
    times, told = iter([0.0, 5.0, 9.9, 10.0]), list[str]()
    reflector = pods(
        kube, cache, access_changed=lambda: told.append("changed"), clock=Clock(monotonic=lambda: next(times))
    )
    api.forbidden = {"n"}
    assert await reflector.list() is None
    assert (reflector.is_forbidden, reflector.known.is_set(), told) == (True, True, ["changed"])
    assert len(api.requests) == 4, "of which the last was at 10 s"
    api.forbidden = set()
    assert await reflector.list() == 50
    assert (reflector.is_forbidden, told) == (False, ["changed", "changed"])
