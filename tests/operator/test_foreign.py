"""Of two installations one serves a pool, and the other says so and does nothing."""

from typing import Any

import msgspec
import pytest

from evenhand_operator.clock import Clock
from evenhand_operator.foreign import ForeignPools, look_whose
from evenhand_operator.kube import ApiError
from evenhand_operator.observed import ObservedPolicy, ObservedPool, read_policy, read_pool
from evenhand_policy.status import EnginePoolStatus
from harness.builders import make_policy, make_pool

Json = dict[str, Any]

OURS, THEIRS = "evenhand-system/evenhand-operator", "default/evenhand-operator"


def pool(name: str, operator: str | None) -> ObservedPool:
    status = {} if operator is None else {"operator": operator}
    observed = read_pool(make_pool(name, status=status))
    assert observed is not None
    return observed


def policy(name: str, pool: str) -> ObservedPolicy:
    observed = read_policy(make_policy(name, poolRef={"name": pool}))
    assert observed is not None
    return observed


def test_pool_is_its_installations_and_of_nobody_the_first_ones() -> None:
    pools = [pool("ours", OURS), pool("new", None), pool("theirs", THEIRS)]
    policies = [policy(name, name) for name in ("ours", "new", "theirs", "missing")]
    served = look_whose(policies, pools, OURS)
    assert [each.key[1] for each in served.pools] == ["ours", "new"]
    assert [each.key[1] for each in served.policies] == ["ours", "new", "missing"]


def test_policy_that_cannot_be_read_is_told_by_somebody() -> None:
    broken = read_policy(make_policy("broken", weight="many"))
    assert broken is not None and broken.policy is None
    assert look_whose([broken], [pool("default", THEIRS)], OURS).policies == (broken,)


class Api:
    """Remembers what is applied, by whom; fails with `error`."""

    def __init__(self) -> None:
        self.applied: list[tuple[str, list[Json]]] = []
        self.error: ApiError | None = None

    async def apply(self, resource: Any, obj: Json, subresource: str, *, manager: str) -> Json:
        if self.error is not None:
            raise self.error
        assert (resource.kind, subresource, obj["metadata"]["namespace"]) == ("EnginePool", "status", "inference")
        self.applied.append((manager, obj["status"]["conditions"]))
        return obj


@pytest.fixture
def api() -> Api:
    return Api()


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.clock = Clock(lambda: self.now, lambda: self.now)


def strangely(name: str, *said_at: str) -> ObservedPool:
    """A pool of ours, on which the other installation has said something at these times."""
    obj = make_pool(name, status={"operator": OURS})
    obj["metadata"]["managedFields"] = [
        {"manager": "kubectl", "operation": "Apply", "time": "2026"},
        *({"manager": f"evenhand-operator/{THEIRS}", "subresource": "status", "time": each} for each in said_at),
    ]
    observed = read_pool(obj)
    assert observed is not None
    return observed


async def test_second_installation_says_so_and_takes_it_back(api: Any, caplog: pytest.LogCaptureFixture) -> None:
    foreign = ForeignPools(api, OURS)
    await foreign.look([pool("default", THEIRS)])
    await foreign.look([pool("default", THEIRS)])
    [(manager, [condition])] = api.applied
    assert manager == f"evenhand-operator/{OURS}", "not the one that owns the rest of the status"
    assert (condition["type"], condition["status"]) == ("ForeignOperator", "True")
    assert OURS in condition["message"] and THEIRS in condition["message"]
    assert "is served by the operator of Lease default/evenhand-operator, and left alone" in caplog.text
    await foreign.look([pool("default", OURS)])
    assert api.applied[1:] == [(manager, [])]
    await foreign.look([pool("default", OURS)])
    assert len(api.applied) == 2


async def test_it_says_so_again_from_time_to_time_and_takes_it_back_at_its_end(api: Any) -> None:
    time = Time()
    foreign = ForeignPools(api, OURS, time.clock)
    for _ in range(3):
        await foreign.look([pool("default", THEIRS)])
        time.now += 300
    texts = {conditions[0]["message"] for _, conditions in api.applied}
    assert len(texts) == 3, "each differs, so that the API server stores when it was said"
    await foreign.take_back()
    assert api.applied[3:] == [(f"evenhand-operator/{OURS}", [])]


async def test_what_an_installation_that_is_gone_has_left_is_taken_back(api: Any) -> None:
    time = Time()
    ours = ForeignPools(api, OURS, time.clock)
    for said_at in ("12:00", "12:05", "12:10"):  # it repeats it, so it is there
        await ours.look([strangely("default", said_at)])
        time.now += 800
    assert api.applied == []
    time.now += 100
    await ours.look([strangely("default", "12:10")])
    assert api.applied == [(f"evenhand-operator/{THEIRS}", [])]
    await ours.look([strangely("default")])
    await ours.look([strangely("default", "13:00")])
    assert len(api.applied) == 1, "it is there again"


async def test_what_we_have_said_ourselves_before_a_pool_was_ours_is_taken_back_at_once(api: Any) -> None:
    theirs = ForeignPools(api, THEIRS)
    moved = msgspec.structs.replace(strangely("default", "12:00"), status=EnginePoolStatus(operator=THEIRS))
    await theirs.look([moved])
    assert api.applied == [(f"evenhand-operator/{THEIRS}", [])]


async def test_what_could_not_be_told_is_told_later(api: Any) -> None:
    foreign = ForeignPools(api, OURS)
    api.error = ApiError(503, "away")
    await foreign.look([pool("default", THEIRS)])
    api.error = None
    await foreign.look([pool("default", THEIRS)])
    assert len(api.applied) == 1
    api.error = ApiError(404, "gone with its namespace")
    await foreign.look([])
    api.error = None
    await foreign.look([])
    assert len(api.applied) == 1, "a pool that is gone has no condition"
