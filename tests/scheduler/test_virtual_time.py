"""The four golden traces of the virtual time: nobody banks credit, nobody pays for what nobody wanted."""

from itertools import chain, repeat

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.stats import StatsRecorder
from evenhand_engine.messages import TenantStats
from evenhand_engine.scheduler.fair_share import VIRTUAL_UNIT, FairShare
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_policy.config import SchedulerConfig, TenantConfig

from .conftest import PretendEngine

SETTINGS = SchedulerSettings(max_num_batched_tokens=64, max_num_seqs=64, num_kv_blocks=4096)


@pytest.fixture
def engine() -> PretendEngine:
    return PretendEngine(SETTINGS, [TenantConfig(tenant_id=tenant_id) for tenant_id in "abc"])


def flood(engine: PretendEngine, *tenant_ids: str) -> None:
    for tenant_id in tenant_ids:
        engine.keep(tenant_id, 16, 100, 4)


def test_silence_then_a_flood_gets_half(engine: PretendEngine) -> None:
    engine.run(2000, lambda: flood(engine, "b"))
    services = engine.services(600, lambda: flood(engine, "a", "b"))
    assert services["a"] / sum(services.values()) == pytest.approx(0.50, abs=0.01)


def test_a_trickle_does_not_hold_the_virtual_time_back(engine: PretendEngine) -> None:
    def trickle() -> None:
        if engine.now % 20 == 0:
            engine.add("c", 10, 2)
        flood(engine, "a")

    def trickle_beside_two() -> None:
        trickle()
        flood(engine, "b")

    engine.run(1000, trickle)
    services = engine.services(600, trickle_beside_two)
    assert services["b"] / services["a"] == pytest.approx(1.0, abs=0.02)


def test_a_lone_user_of_idle_capacity_owes_nothing(engine: PretendEngine) -> None:
    engine.run(1000, lambda: engine.keep("a", 1, 30, 10))
    services = engine.services(600, lambda: flood(engine, "a", "b"))
    assert services["b"] / sum(services.values()) == pytest.approx(0.50, abs=0.01)


def test_a_closed_loop_that_leaves_nothing_waiting_banks_nothing(engine: PretendEngine) -> None:
    """Client a never has more than one request, so it uses less than its share; it may not save up the rest."""

    def closed_loop_beside_flood() -> None:
        engine.keep("a", 1, 30, 10)
        flood(engine, "b")

    closed_loop = engine.services(1000, closed_loop_beside_flood)
    assert closed_loop["a"] / sum(closed_loop.values()) < 0.1
    services = engine.services(300, lambda: flood(engine, "a", "b"))
    assert services["a"] / sum(services.values()) == pytest.approx(0.50, abs=0.01)


def test_weights_divide_the_service(engine: PretendEngine) -> None:
    weights = {"x": 1, "y": 2, "z": 5}
    engine = PretendEngine(SETTINGS, [TenantConfig(tenant_id=i, weight=weight) for i, weight in weights.items()])
    services = engine.services(3000, lambda: flood(engine, *weights))
    for tenant_id, weight in weights.items():
        assert services[tenant_id] / sum(services.values()) == pytest.approx(weight / 8, rel=0.02)


def test_decodes_beyond_the_budget_take_turns_by_service() -> None:
    """Three streams, replayed in steps of two tokens."""
    settings = SchedulerSettings(num_kv_blocks=4096, block_size=4)
    tenants = tuple(TenantConfig(tenant_id=tenant_id) for tenant_id in "abc")
    engine = PretendEngine(settings, tenants)
    engine.scheduler = Scheduler(settings, SchedulerConfig(tenants=tenants), token_budgets=chain([3], repeat(2)))
    for tenant_id in "abc":
        engine.add(tenant_id, 1, 1000)
    engine.run(20)
    services = engine.services(100, lambda: None)
    assert sum(services.values()) == 400
    assert max(services.values()) - min(services.values()) <= 4


def test_the_lag_of_who_waits_is_shown_with_its_bound(engine: PretendEngine) -> None:
    recorder = StatsRecorder(engine.scheduler)
    seen: list[TenantStats] = []
    for _ in range(200):
        engine.keep("a", 1, 30, 10)
        flood(engine, "b", "c")
        engine.step()
        stats = recorder.snapshot(engine.now, is_idle=True)
        assert stats is not None
        seen += stats.tenants
    assert {row.tenant_id for row in seen if row.lag > 0} >= {"b", "c"}
    assert all(0 <= row.lag <= row.lag_bound for row in seen)
    assert {row.lag_bound for row in seen} == {64 * 2 + 8192 + 1536 + 64 + 64 * 2}
    engine.drain()
    idle = recorder.snapshot(engine.now + 1, is_idle=True)
    assert idle is not None and all(row.lag == 0 for row in idle.tenants)


def test_who_is_deleted_is_reported_once(engine: PretendEngine) -> None:
    recorder = StatsRecorder(engine.scheduler)
    flood(engine, "b", "c")
    engine.step()
    assert recorder.snapshot(0.0, is_idle=True).retired_tenants == ()  # type: ignore[union-attr]
    engine.scheduler.reconfigure(SchedulerConfig())
    retired = [recorder.snapshot(float(n), is_idle=True).retired_tenants for n in range(2)]  # type: ignore[union-attr]
    assert (set(retired[0]) >= {"b", "c"}, retired[1]) == (True, ())
    engine.drain()


class TestFairShare:
    """The accounts alone."""

    def test_an_account_is_never_behind_the_virtual_time(self) -> None:
        shares = FairShare()
        shares.charge("a", 100, 1)
        shares.charge("b", 30, 2)
        shares.close_step({"a", "b"})
        assert shares.virtual_time == 15 * VIRTUAL_UNIT
        assert shares.virtual_service("new") == shares.virtual_time

    def test_a_step_that_leaves_nobody_out_settles_all(self) -> None:
        shares = FairShare()
        shares.charge("a", 100, 1)
        shares.close_step(())
        assert shares.virtual_service("a") == shares.virtual_service("b") == 100 * VIRTUAL_UNIT

    def test_debt_survives_while_others_are_left_out(self) -> None:
        shares = FairShare()
        shares.charge("a", 100, 1)
        shares.close_step({"b"})
        assert shares.virtual_service("a") - shares.virtual_service("b") == 100 * VIRTUAL_UNIT

    def test_the_virtual_time_never_goes_back(self) -> None:
        shares = FairShare()
        shares.charge("a", 100, 1)
        shares.close_step({"a"})
        shares.charge("a", -10, 1)
        shares.close_step({"a"})
        assert shares.virtual_time == shares.virtual_service("a") == 100 * VIRTUAL_UNIT
