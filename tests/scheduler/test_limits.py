"""A tenant's own limits: ceilings, concurrency, patience, suspension, and its end."""

from evenhand_engine.config import SchedulingPolicy
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import Limits, SchedulerConfig, TenantConfig

from .conftest import PretendEngine
from .small_cache import held, small, tenant


def test_a_ceiling_holds_its_own_tenant_back_and_earns_no_credit() -> None:
    engine = PretendEngine(small(preemption_lag=1), [tenant("capped", most=25), tenant("free")])

    def flood() -> None:
        engine.keep("capped", 8, 30, 20)
        engine.keep("free", 4, 20, 10)

    engine.run(500, flood)
    assert 0 < max(held(engine, "capped") for _ in [engine.step()]) <= 16
    assert engine.scheduler.num_preemptions == 0 or engine.service("capped") > 0
    engine.scheduler.reconfigure(SchedulerConfig(tenants=(tenant("capped"), tenant("free"))))
    services = engine.services(300, flood)
    assert services["capped"] < 2 * services["free"], "no credit was banked while the ceiling held"


def test_an_output_that_outgrows_the_ceiling_ends_by_length() -> None:
    engine = PretendEngine(small(), [tenant("capped", most=25)])
    request = engine.add("capped", 40, 500)
    engine.drain()
    assert engine.finish_reason(request) is FinishReason.LENGTH
    assert len(engine.token_ids(request)) == 64 - 40 + 1


def test_a_prompt_beyond_the_ceiling_is_refused_at_once() -> None:
    engine = PretendEngine(small(), [tenant("capped", most=25)])
    request = engine.add("capped", 64, 4)
    engine.step()
    assert engine.finish_reason(request) is FinishReason.OVERLOADED


def test_holding_the_whole_cache_is_not_a_ceiling() -> None:
    """Nobody's own limit is reached, so that the youngest yields, as fcfs has it, not the least computed."""
    engine = PretendEngine(small(scheduling_policy=SchedulingPolicy.FCFS), [tenant("a")])
    first, second = engine.add("a", 80, 100), engine.add("a", 150, 100)
    engine.run(60)
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)


def test_a_concurrency_limit_queues_the_rest() -> None:
    limits = Limits(max_concurrent_requests=2)
    engine = PretendEngine(small(), [TenantConfig(tenant_id="a", limits=limits)])
    requests = [engine.add("a", 8, 20) for _ in range(5)]
    queue = engine.scheduler.request_table.tenants["a"]
    assert queue.num_deferred == 3
    engine.run(3)
    assert (len(queue.waiting), queue.num_deferred) == (3, 3)
    assert sum(request.started_at is not None for request in requests) == 2
    engine.drain()
    assert all(engine.finish_reason(request) is FinishReason.STOP for request in requests)


def test_the_queue_timeout_ends_who_never_started_but_not_who_was_preempted() -> None:
    limits = Limits(max_concurrent_requests=1, queue_timeout_ms=10_000)
    config = TenantConfig(tenant_id="hog", limits=limits)
    engine = PretendEngine(small(), [config, tenant("owner", guaranteed=90)])
    running, queued = engine.add("hog", 100, 60), engine.add("hog", 8, 2)
    engine.run(8)
    engine.add("owner", 200, 20)
    engine.run(8)
    assert running.num_preemptions == 1
    assert engine.finish_reason(queued) is FinishReason.QUEUE_TIMEOUT
    engine.drain()
    assert engine.finish_reason(running) is FinishReason.STOP


def test_suspension_ends_what_is_queued_and_serves_what_ran() -> None:
    engine = PretendEngine(small(), [TenantConfig(tenant_id="a", limits=Limits(max_concurrent_requests=1))])
    running, queued = engine.add("a", 8, 20), engine.add("a", 8, 20)
    engine.run(2)
    suspended = TenantConfig(tenant_id="a", limits=Limits(max_concurrent_requests=1), suspended=True)
    engine.scheduler.reconfigure(SchedulerConfig(tenants=(suspended,)))
    late = engine.add("a", 8, 2)
    engine.drain()
    assert engine.finish_reason(running) is FinishReason.STOP
    assert engine.finish_reason(queued) is engine.finish_reason(late) is FinishReason.TENANT_SUSPENDED


def test_suspension_serves_who_was_preempted_to_the_end() -> None:
    engine = PretendEngine(small(), [tenant("hog"), tenant("owner", guaranteed=90)])
    preempted = engine.add("hog", 100, 30)
    engine.run(6)
    engine.add("owner", 200, 20)
    engine.run(3)
    assert preempted.num_preemptions == 1 and preempted.started_at is None
    suspended = TenantConfig(tenant_id="hog", suspended=True)
    engine.scheduler.reconfigure(SchedulerConfig(tenants=(suspended, tenant("owner", guaranteed=90))))
    engine.drain()
    assert engine.finish_reason(preempted) is FinishReason.STOP


def test_what_a_deleted_tenant_has_left_is_served_under_the_unknown_tenants_share() -> None:
    engine = PretendEngine(small(), [tenant("gone")])
    running, queued = engine.add("gone", 100, 20), engine.add("gone", 200, 4)
    engine.run(4)
    engine.scheduler.reconfigure(SchedulerConfig())
    engine.scheduler.request_table.check_integrity()
    assert running.tenant_id == queued.tenant_id == "default"
    engine.drain()
    assert engine.finish_reason(running) is engine.finish_reason(queued) is FinishReason.STOP
