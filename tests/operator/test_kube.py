"""The operator's own requests, against a server that answers as an API server may."""

import json
from pathlib import Path
from typing import Any

import kopf
import pytest

from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.resources import ENGINE_POOLS, PODS, TENANT_POLICIES

Json = dict[str, Any]


async def test_renewed_token_is_taken_once_the_old_one_is_refused(api: Any, kube: KubeClient) -> None:
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
        (429, {"Retry-After": "60"}, True, 60),
        (500, {}, True, 0),
        (503, {"Retry-After": "soon"}, True, 0),
    ],
)
async def test_refusal_says_what_and_whether_to_try_again(
    api: Any, kube: KubeClient, status: int, headers: dict[str, str], is_transient: bool, retry_after: float
) -> None:
    api.refusals.append((status, {"message": "not today"}, headers))
    with pytest.raises(ApiError, match=rf"{status}: GET /apis/evenhand.dev/.*/n/enginepools/a: not today") as caught:
        await kube.get(ENGINE_POOLS, "n", "a")
    assert (caught.value.is_transient, caught.value.retry_after) == (is_transient, retry_after)


async def test_what_was_too_much_is_asked_again_after_as_long_as_the_server_says(
    api: Any, kube: KubeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("evenhand_operator.kube.asyncio.sleep", sleep)
    api.refusals += [(429, {"message": "too many"}, {"Retry-After": "3"})] * 2
    await kube.get(ENGINE_POOLS, "n", "a")
    assert pauses == [3, 3]
    api.refusals += [(429, {"message": "too many"}, {"Retry-After": "3"})] * 3
    with pytest.raises(ApiError, match="too many"):
        await kube.get(ENGINE_POOLS, "n", "a")
    assert len(api.requests) == 6
    api.refusals += [(429, {"message": "too many"}, {})]
    with pytest.raises(ApiError, match="too many"):
        await kube.get(ENGINE_POOLS, "n", "a")
    assert len(api.requests) == 7, "without a word on when it is not asked again at once"


async def test_credentials_are_read_again_when_nobody_has_answered_for_long(
    unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authority may be another, in a file of the same name."""
    read = []

    def log_in() -> kopf.ConnectionInfo:
        read.append(None)
        return kopf.ConnectionInfo(server=f"http://127.0.0.1:{unused_tcp_port}", token="t")

    client = KubeClient(log_in)
    for silence, expected in ((30.0, 1), (0.0, 2)):
        monkeypatch.setattr("evenhand_operator.kube._UNANSWERED_SECONDS", silence)
        with pytest.raises(ApiError):
            await client.get(ENGINE_POOLS, "n", "a")
        assert len(read) == expected
    await client.close()


async def test_page_of_somebody_in_between_is_no_answer_and_transient(api: Any, kube: KubeClient) -> None:
    api.page = "<html>We are down for maintenance</html>"
    with pytest.raises(ApiError, match="none of an API server") as caught:
        await kube.get(ENGINE_POOLS, "n", "a")
    assert caught.value.is_transient
    with pytest.raises(ApiError, match="none of an API server"):
        [page async for page in kube.list_pages(PODS, "n")]


async def test_server_that_is_away_is_transient(unused_tcp_port: int) -> None:
    info = kopf.ConnectionInfo(server=f"http://127.0.0.1:{unused_tcp_port}", token="t")
    client = KubeClient(lambda: info)
    with pytest.raises(ApiError) as caught:
        await client.get(ENGINE_POOLS, "n", "a")
    assert (caught.value.status, caught.value.is_transient) == (0, True)
    await client.close()


async def test_status_is_applied_as_its_field_manager_and_with_its_kind(api: Any, kube: KubeClient) -> None:
    obj = {"metadata": {"name": "a", "namespace": "n"}, "status": {"observedGeneration": 1}}
    assert (await kube.apply(TENANT_POLICIES, obj, "status"))["kind"] == "TenantPolicy"
    [request] = api.requests
    assert (request.method, request.path.rpartition("/")[2]) == ("PATCH", "status")
    assert dict(request.query) == {"fieldManager": "evenhand-operator", "force": "true"}
    assert request.headers["Content-Type"] == "application/apply-patch+yaml"


# ---- watches


async def test_watch_yields_events_and_bookmarks_however_they_are_cut(api: Any, kube: KubeClient) -> None:
    api.watch_lines = [b'{"type": "ADDED", "object": {"x', b'": 1}}\n{"type": "BOOK', b'MARK", "object": {}}\n{"type"']
    seen = [each async for each in kube.watch(PODS, "n", 7, labelSelector="a=b")]
    assert seen == [("ADDED", {"x": 1}), ("BOOKMARK", {})], "what is cut off is of no use"
    [request] = api.requests
    asked = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": "7", "labelSelector": "a=b"}
    assert asked.items() <= dict(request.query).items()
    assert 200 <= int(request.query["timeoutSeconds"]) <= 300


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b'{"type": "ERROR", "object": {"code": 410, "message": "too old"}}\n', 410),
        (b'{"type": "ERROR", "object": {}}\n', 500),
        (b"<html>\n", 0),
        (b"{}\n", 0),
    ],
)
async def test_watch_that_fails_says_why(api: Any, kube: KubeClient, line: bytes, status: int) -> None:
    api.watch_lines = [line]
    with pytest.raises(ApiError) as caught:
        async for _ in kube.watch(PODS, None, 7):
            raise AssertionError
    assert caught.value.status == status


async def test_watch_that_is_refused_says_why(api: Any, kube: KubeClient) -> None:
    api.refusals = [(403, {"message": "pods is forbidden"}, {})]
    with pytest.raises(ApiError, match="403: GET /api/v1/namespaces/n/pods: pods is forbidden"):
        async for _ in kube.watch(PODS, "n", 7):
            raise AssertionError


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
