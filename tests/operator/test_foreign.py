"""Of two installations one serves a pool, and the other says so and does nothing."""

from typing import Any

import pytest

from evenhand_operator.foreign import ForeignPools, look_whose
from evenhand_operator.kube import ApiError
from evenhand_operator.observed import ObservedPolicy, ObservedPool, read_policy, read_pool
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
    assert [each.key[1] for each in served.foreign] == ["theirs"]


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


async def test_second_installation_is_told_once_and_taken_back(api: Any, caplog: pytest.LogCaptureFixture) -> None:
    foreign = ForeignPools(api, OURS)
    await foreign.tell([pool("default", THEIRS)])
    await foreign.tell([pool("default", THEIRS)])
    [(manager, [condition])] = api.applied
    assert manager == f"evenhand-operator/{OURS}", "not the one that owns the rest of the status"
    assert (condition["type"], condition["status"]) == ("ForeignOperator", "True")
    assert OURS in condition["message"] and THEIRS in condition["message"]
    assert "is served by the operator of Lease default/evenhand-operator, and left alone" in caplog.text
    await foreign.tell([])
    assert api.applied[1:] == [(manager, [])]
    await foreign.tell([])
    assert len(api.applied) == 2


async def test_what_could_not_be_told_is_told_later(api: Any) -> None:
    foreign = ForeignPools(api, OURS)
    api.error = ApiError(503, "away")
    await foreign.tell([pool("default", THEIRS)])
    api.error = None
    await foreign.tell([pool("default", THEIRS)])
    assert len(api.applied) == 1
    api.error = ApiError(404, "gone with its namespace")
    await foreign.tell([])
    api.error = None
    await foreign.tell([])
    assert len(api.applied) == 1, "a pool that is gone has no condition"
