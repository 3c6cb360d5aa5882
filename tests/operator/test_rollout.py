"""Versions: they grow with what is enforced, and a new leader goes on where the last one was."""

from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.rollout import Rollout, Stored
from evenhand_policy.config import SchedulerConfig, TenantConfig
from evenhand_policy.push_document import encode_document
from evenhand_policy.version import Version
from harness.observed import policy, status_of


def config(*tenants: tuple[str, int]) -> SchedulerConfig:
    return SchedulerConfig(
        tenants=tuple(TenantConfig(tenant_id=name, uid=f"uid-inference-{name}", generation=g) for name, g in tenants)
    )


def advance(
    rollout: Rollout, config: SchedulerConfig, policies: dict[str, ObservedPolicy] | None = None, num_replicas: int = 1
) -> bool:
    return rollout.advance(config, encode_document(config), num_replicas, policies or {})


def test_revision_grows_with_the_content_and_the_number_of_replicas_and_only_with_them() -> None:
    rollout = Rollout(3, Stored(41))
    assert advance(rollout, config(("a", 1)))
    assert rollout.version == (3, 42)
    assert not advance(rollout, config(("a", 1)))
    assert advance(rollout, config(("a", 2)))
    assert rollout.version == (3, 43)
    assert advance(rollout, config(("a", 2)), num_replicas=2)
    assert rollout.version == (3, 44)


def test_new_leader_goes_on_where_the_last_one_was() -> None:
    content = config(("a", 1))
    stored = Stored(41, 2, content, encode_document(content))
    same, other, more = (Rollout(4, stored) for _ in range(3))
    assert advance(same, config(("a", 1)), num_replicas=2)
    assert same.version == (4, 41)
    advance(other, config(("a", 2)), num_replicas=2)
    assert other.version == (4, 42)
    advance(more, config(("a", 1)), num_replicas=3)
    assert more.version == (4, 42)


def test_first_version_of_a_policy_outlives_changes_of_others() -> None:
    rollout = Rollout(1, Stored(0))
    advance(rollout, config(("a", 1)))
    advance(rollout, config(("a", 1), ("b", 1)))
    assert (rollout.first_version(policy("a")), rollout.first_version(policy("b"))) == ((1, 1), (1, 2))
    assert rollout.first_version(policy("a", generation=2)) is None
    advance(rollout, config(("a", 2), ("b", 1)))
    assert rollout.first_version(policy("a", generation=2)) == (1, 3)
    advance(rollout, config(("b", 1)))
    assert rollout.first_version(policy("a", generation=2)) is None


def test_what_an_earlier_leader_reported_holds_but_only_at_first() -> None:
    programmed = policy("a", status=status_of("True", "True"))
    rollout = Rollout(4, Stored(41))
    advance(rollout, config(("a", 1), ("b", 1)), {programmed.uid: programmed})
    assert (rollout.first_version(programmed), rollout.first_version(policy("b"))) == ((0, 0), (4, 42))
    advance(rollout, config(("b", 1)), {programmed.uid: programmed})
    advance(rollout, config(("a", 1), ("b", 1)), {programmed.uid: programmed})
    assert rollout.first_version(programmed) == (4, 44)


def test_nothing_is_known_of_a_document_that_another_leader_made() -> None:
    rollout = Rollout(4, Stored(7))
    advance(rollout, config(("a", 1)))
    rollout.raise_above(10, Version(9, 30))
    assert rollout.version == rollout.first_version(policy("a")) == (10, 31)
    rollout.raise_above(11, Version(10, 2**63 - 1))
    assert rollout.version.revision < 2**21, "a pod cannot use the numbers up"
