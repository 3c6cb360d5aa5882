"""Events are few, whatever happens, and telling of them may fail."""

import asyncio
from typing import Any

import msgspec
import pytest

from evenhand_operator.events import EventRecorder, Transition, transitions
from evenhand_operator.kube import ApiError
from evenhand_operator.observed import ObservedPolicy
from evenhand_policy.status import Condition, ConditionStatus, TenantPolicyStatus

POLICY = ObservedPolicy(
    key=("team", "chat"), uid="u1", generation=1, problem=None, policy=None, status=TenantPolicyStatus()
)


class Api:
    """Keeps what is created."""

    def __init__(self, status: int = 0) -> None:
        self.events: list[dict[str, Any]] = []
        self._status = status

    async def create(self, _: object, event: dict[str, Any]) -> None:
        if self._status:
            raise ApiError(self._status, "no")
        self.events.append(event)


async def record(api: Api, count: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        recorder = EventRecorder(api, tasks)  # type: ignore[arg-type]
        for index in range(count):
            recorder.record(POLICY, Transition(index % 2 == 0, "Conflicted", f"for the {index}th time"))


async def test_event_is_about_the_object() -> None:
    api = Api()
    await record(api, 2)
    first, second = api.events
    assert first["involvedObject"]["uid"] == "u1"
    assert (first["involvedObject"]["kind"], first["metadata"]["namespace"]) == ("TenantPolicy", "team")
    assert [(event["type"], event["message"]) for event in (first, second)] == [
        ("Warning", "for the 0th time"),
        ("Normal", "for the 1th time"),
    ]
    assert first["metadata"]["name"] != second["metadata"]["name"]


@pytest.mark.parametrize("name", ["a" * 199 + "-" + "b" * 9, "a" * 199 + ".b", "a" * 253, "a"])
async def test_name_of_an_event_is_one_that_an_object_may_have(name: str) -> None:
    api = Api()
    async with asyncio.TaskGroup() as tasks:
        recorder = EventRecorder(api, tasks)  # type: ignore[arg-type]
        recorder.record(msgspec.structs.replace(POLICY, key=("team", name)), Transition(True, "Conflicted", "why"))
    [event] = api.events
    given = event["metadata"]["name"]
    assert len(given) <= 253
    assert all(part[-1].isalnum() for part in given.split("."))
    assert given.startswith(name[:199])


async def test_flood_of_transitions_is_no_flood_of_events() -> None:
    api = Api()
    await record(api, 5000)
    assert 50 <= len(api.events) <= 100


async def test_event_that_cannot_be_written_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    await record(Api(status=403), 1)
    assert "an event was not written" in caplog.text


def condition(kind: str, status: str, reason: str) -> Condition:
    return Condition(
        type=kind,
        status=ConditionStatus(status),
        observed_generation=1,
        last_transition_time="2026-01-01T00:00:00Z",
        reason=reason,
        message=f"{kind} is {status}",
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("Unknown", "Pending"), ("True", "Accepted"), None),
        (("Unknown", "Pending"), ("False", "Invalid"), (True, "Invalid")),
        (("True", "Accepted"), ("True", "Accepted"), None),
        (("True", "Accepted"), ("False", "Conflicted"), (True, "Conflicted")),
        (("False", "Conflicted"), ("False", "Conflicted"), None),
        (("False", "Conflicted"), ("False", "Invalid"), (True, "Invalid")),
        (("False", "Conflicted"), ("True", "Accepted"), (False, "Accepted")),
        (("True", "Programmed"), ("False", "Pending"), None),
        (("False", "Pending"), ("True", "Programmed"), None),
    ],
)
def test_events_tell_transitions_only(
    before: tuple[str, str], after: tuple[str, str], expected: tuple[bool, str] | None
) -> None:
    found = transitions([condition("Accepted", *before)], [condition("Accepted", *after)])
    assert [(each.is_warning, each.reason) for each in found] == ([] if expected is None else [expected])
