"""One seat in 32 is left by tenants that have many, for those that have few."""

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_policy.config import SchedulerConfig, TenantConfig

from .conftest import PretendEngine

SEATS, RESERVED = 64, 2


def roomy(*tenant_ids: str, policy: SchedulingPolicy = SchedulingPolicy.FAIR, slack: int = 256) -> PretendEngine:
    """Memory for everybody; seats are what is scarce."""
    settings = SchedulerSettings(
        scheduling_policy=policy,
        max_num_batched_tokens=slack,
        max_num_seqs=SEATS,
        num_kv_blocks=4_096,
        min_run_seconds=0.0,
        preemption_lag=400,
    )
    return PretendEngine(settings, [TenantConfig(tenant_id=tenant_id) for tenant_id in tenant_ids])


def num_running(engine: PretendEngine, tenant_id: str) -> int:
    tenant = engine.scheduler.request_table.tenants.get(tenant_id)
    return tenant.num_running if tenant else 0


def beside_a_flood(**changes: object) -> PretendEngine:
    """A flood has taken the seats that it may, before the other tenant has ever come."""
    engine = roomy("flood", "quiet", **changes)  # type: ignore[arg-type]
    for _ in range(2 * SEATS):
        engine.add("flood", 4, 400)
    engine.run(10)
    return engine


def test_a_tenant_that_comes_finds_a_seat_beside_a_flood() -> None:
    engine = beside_a_flood()
    assert num_running(engine, "flood") == SEATS - RESERVED
    first, second = engine.add("quiet", 4, 50), engine.add("quiet", 4, 50)
    engine.run(1)
    assert first.started_at is not None and second.started_at is not None
    assert engine.scheduler.num_preemptions == 0
    engine.drain()


def test_first_come_first_served_leaves_none() -> None:
    assert num_running(beside_a_flood(policy=SchedulingPolicy.FCFS), "flood") == SEATS


def test_nothing_is_left_where_there_is_nobody_to_leave_it_to() -> None:
    engine = roomy("flood")
    for _ in range(2 * SEATS):
        engine.add("flood", 4, 400)
    engine.run(10)
    assert num_running(engine, "flood") == SEATS


def test_tenants_with_few_seats_each_take_all() -> None:
    tenant_ids = [f"{number}" for number in range(32)]
    engine = roomy(*tenant_ids)
    for tenant_id in 4 * tenant_ids:
        engine.add(tenant_id, 4, 400)
    engine.run(10)
    assert sum(num_running(engine, tenant_id) for tenant_id in tenant_ids) == SEATS


def test_who_is_ahead_by_more_than_the_slack_takes_no_seat_that_another_left() -> None:
    """It is the flood's turn, by service, so what it leaves is not for somebody who has had more than his share."""
    engine = beside_a_flood(slack=128)
    engine.scheduler.ledger.shares.charge("quiet", 2_000, 1)
    late = engine.add("quiet", 4, 4)
    engine.run(5)
    assert late.started_at is None and num_running(engine, "flood") >= SEATS - RESERVED
    engine.drain()


def test_a_tenant_that_has_many_and_is_far_behind_gets_more_by_preemption() -> None:
    engine = beside_a_flood()
    heavy = TenantConfig(tenant_id="quiet", weight=20)
    engine.scheduler.reconfigure(SchedulerConfig(tenants=(TenantConfig(tenant_id="flood"), heavy)))
    for _ in range(SEATS):
        engine.add("quiet", 4, 400)
    engine.run(150)
    assert num_running(engine, "quiet") == SEATS - RESERVED
    assert num_running(engine, "flood") == RESERVED, "it has few by now"
    engine.drain()
