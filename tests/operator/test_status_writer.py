"""What a status write sends, and which failures are worth another try."""

from types import SimpleNamespace
from typing import Any

import pytest

from evenhand_operator.cache import Cache
from evenhand_operator.conditions import policy_programmed, policy_status
from evenhand_operator.kube import ApiError
from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.status_writer import StatusChange, StatusWriter
from evenhand_policy.errors import Reason, problem_of

Json = dict[str, Any]


class Api:
    """The API server, and what the cache and the writer tell."""

    def __init__(self) -> None:
        self.sent: list[Json] = []
        self.refusal: ApiError | None = None
        self.told: list[str] = []
        self.cache = Cache(self)

    async def apply(self, resource: Any, obj: Json, subresource: str) -> Json:
        assert subresource == "status"
        self.sent.append(obj)
        if self.refusal:
            raise self.refusal
        metadata = obj["metadata"] | {"resourceVersion": "9", "creationTimestamp": "2026-01-01T00:00:00Z"}
        kind = {"apiVersion": resource.api_version, "kind": resource.kind}
        return {**kind, "metadata": metadata, "spec": {}, "status": obj["status"]}

    def record(self, _: ObservedPolicy, transition: Any) -> None:
        self.told.append(transition.reason)

    def documents_changed(self) -> None: ...
    def pods_changed(self) -> None: ...
    def statuses_changed(self) -> None: ...
    def gap_seen(self) -> None: ...


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def change(api: Api) -> StatusChange:
    """The policy `a` turns out to name a Secret that is not there."""
    metadata = {
        "name": "a",
        "namespace": "n",
        "uid": "uid-a",
        "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    kind = {"apiVersion": "evenhand.dev/v1alpha1", "kind": "TenantPolicy"}
    api.cache.policies.observe("ADDED", {**kind, "metadata": metadata, "spec": {}})
    [observed] = api.cache.policies
    assert observed.policy
    problems = (problem_of(observed.policy, Reason.SECRET_NOT_FOUND, "spec", "create it"),)
    verdict = policy_programmed(observed, problems, None, None)
    return StatusChange(observed, policy_status(observed, problems, None, verdict, 1_800_000_000.0))


@pytest.fixture
def writer(api: Api) -> StatusWriter:
    parts: Any = (api, api.cache, SimpleNamespace(record=api.record))
    return StatusWriter(*parts)


async def test_answer_to_a_write_is_what_is_there(api: Api, change: StatusChange, writer: StatusWriter) -> None:
    assert change.is_needed
    assert await writer.write([change]) == 0
    [observed] = api.cache.policies
    assert not StatusChange(observed, change.status).is_needed, "before any event has come"
    assert api.sent[0]["metadata"] == {"name": "a", "namespace": "n", "uid": "uid-a"}, "no other object of that name"
    assert "programmedRevision" not in api.sent[0]["status"], "the API server takes no null"
    assert api.told == ["SecretNotFound"]


@pytest.mark.parametrize(("status", "num_failed"), [(404, 0), (409, 0), (403, 1), (429, 1), (503, 1), (0, 1)])
async def test_what_is_gone_is_not_tried_again(
    api: Api, change: StatusChange, writer: StatusWriter, status: int, num_failed: int
) -> None:
    api.refusal = ApiError(status, "no")
    assert await writer.write([change, change]) == 2 * num_failed
    assert api.told == [], "of what was not written no Event tells"
