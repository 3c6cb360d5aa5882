"""What a status write sends, and which failures are worth another try."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from evenhand_operator.cache import Cache
from evenhand_operator.clock import Clock
from evenhand_operator.conditions import policy_programmed, policy_status
from evenhand_operator.kube import ApiError
from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.status_writer import StatusChange, StatusWriter
from evenhand_policy.errors import Reason, problem_of
from harness.builders import NAMESPACE, Notices, make_policy

Json = dict[str, Any]


class Api:
    """The API server, and what the cache and the writer tell."""

    def __init__(self) -> None:
        self.sent: list[Json] = []
        self.refusal: ApiError | None = None
        self.now = 100.0
        self.stores: Callable[[Json], Json] = lambda status: status
        self.told: list[str] = []
        self.cache = Cache(Notices())

    async def apply(self, resource: Any, obj: Json, subresource: str) -> Json:
        assert subresource == "status"
        self.sent.append(obj)
        if self.refusal:
            raise self.refusal
        assert resource.kind == "TenantPolicy"
        return make_policy(obj["metadata"]["name"], meta={"version": 9}, status=self.stores(obj["status"]))

    def record(self, _: ObservedPolicy, transition: Any) -> None:
        self.told.append(transition.reason)


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def change(api: Api) -> StatusChange:
    """The policy `a` turns out to name a Secret that is not there."""
    api.cache.policies.observe("ADDED", make_policy("a"))
    [observed] = api.cache.policies
    assert observed.policy
    problems = (problem_of(observed.policy, Reason.SECRET_NOT_FOUND, "spec", "create it"),)
    verdict = policy_programmed(observed, problems, None, None)
    return StatusChange(observed, policy_status(observed, problems, None, verdict, 1_800_000_000.0))


@pytest.fixture
def writer(api: Api) -> StatusWriter:
    parts: Any = (api, api.cache, SimpleNamespace(record=api.record))
    return StatusWriter(*parts, clock=Clock(monotonic=lambda: api.now))


async def test_answer_to_a_write_is_what_is_there(api: Api, change: StatusChange, writer: StatusWriter) -> None:
    assert change.is_needed
    assert await writer.write([change]) == 0
    [observed] = api.cache.policies
    assert not StatusChange(observed, change.status).is_needed, "before any event has come"
    assert api.sent[0]["metadata"] == {"name": "a", "namespace": NAMESPACE, "uid": "uid-a"}, (
        "no other object of that name"
    )
    assert "programmedRevision" not in api.sent[0]["status"], "the API server takes no null"
    assert api.told == ["SecretNotFound"]


@pytest.mark.parametrize(("status", "num_failed"), [(404, 0), (409, 0), (403, 1), (429, 1), (503, 1), (0, 1)])
async def test_what_is_gone_is_not_tried_again(
    api: Api, change: StatusChange, writer: StatusWriter, status: int, num_failed: int
) -> None:
    api.refusal = ApiError(status, "no")
    assert await writer.write([change, change]) == 2 * num_failed
    assert api.told == [], "of what was not written no Event tells"


@pytest.mark.parametrize(
    ("status", "retry_after", "pauses"),
    [(503, 0, [2, 2, 2]), (429, 7, [7, 7]), (0, 0, [2, 2]), (422, 0, [2, 4, 8, 16]), (403, 0, [2, 4, 8])],
)
async def test_what_failed_is_due_again_after_a_pause(
    api: Api, change: StatusChange, writer: StatusWriter, status: int, retry_after: float, pauses: list[float]
) -> None:
    """As long as the server asks for; ever longer where another try heals nothing."""
    api.refusal = ApiError(status, "no", retry_after)
    for pause in pauses:
        assert writer.is_due(change)
        assert await writer.write([change]) == 1
        api.now += pause - 0.01
        assert not writer.is_due(change)
        api.now += 0.01


async def test_pause_has_an_end(api: Api, change: StatusChange, writer: StatusWriter) -> None:
    api.refusal = ApiError(422, "no")
    for _ in range(20):
        await writer.write([change])
    api.now += 300
    assert writer.is_due(change)


async def test_edit_of_what_failed_is_due_at_once(api: Api, change: StatusChange, writer: StatusWriter) -> None:
    api.refusal = ApiError(422, "no")
    await writer.write([change])
    edited = msgspec.structs.replace(change.observed, generation=2)
    assert writer.is_due(change._replace(observed=edited))


async def test_what_an_older_crd_drops_is_not_written_for_ever(
    api: Api, change: StatusChange, writer: StatusWriter
) -> None:
    def cut(status: Json) -> Json:
        return {name: value for name, value in status.items() if name != "observedGeneration"}

    api.stores = cut
    assert await writer.write([change]) == 0
    [observed] = api.cache.policies
    again = change._replace(observed=observed)
    assert again.is_needed and not writer.is_due(again)
    other = msgspec.structs.replace(change.status, conditions=())
    assert writer.is_due(again._replace(status=other)), "what is to be said is another"


async def test_what_an_older_crd_does_not_declare_is_left_out(
    api: Api, change: StatusChange, writer: StatusWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server-side apply refuses such a member, and with it the whole status."""
    apply = api.apply

    async def strict(resource: Any, obj: Json, subresource: str) -> Json:
        found = []
        if "observedGeneration" in obj["status"]:
            found.append(".status.observedGeneration: field not declared in schema")
        if any("message" in row for row in obj["status"]["conditions"]):
            found.append('.status.conditions[type="Ready"].message: field not declared in schema')
        if found:
            raise ApiError(500, f"failed to create typed patch object (n/a; v1, Kind=X): {found[0]}")
        return await apply(resource, obj, subresource)

    monkeypatch.setattr(api, "apply", strict)
    assert await writer.write([change]) == 0
    assert set(api.sent[0]["status"]) == {"conditions"}
    assert len(api.sent[0]["status"]["conditions"]) == 4
