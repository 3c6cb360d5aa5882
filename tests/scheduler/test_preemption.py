"""Memory and seats: guarantees are reclaimed, those far behind are served, and nobody preempts in turn."""

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import KvCacheShare, Limits, SchedulerConfig, TenantConfig

from .conftest import PretendEngine


def small(**changes: object) -> SchedulerSettings:
    """A cache of 64 blocks of 4 tokens; everything else generous."""
    defaults: dict[str, object] = {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 64,
        "num_kv_blocks": 64,
        "block_size": 4,
        "preemption_lag": 64,
        "min_run_seconds": 5.0,
    }
    return SchedulerSettings(**(defaults | changes))  # type: ignore[arg-type]


def tenant(tenant_id: str, *, guaranteed: int = 0, most: int = 100, weight: int = 1) -> TenantConfig:
    share = KvCacheShare(guaranteed_percent=guaranteed, max_percent=most)
    return TenantConfig(tenant_id=tenant_id, kv_cache=share, weight=weight)


def held(engine: PretendEngine, tenant_id: str) -> int:
    return engine.scheduler.request_table.blocks.num_held_blocks(tenant_id)


def test_a_tenant_within_its_guarantee_reclaims_lent_memory_at_once() -> None:
    engine = PretendEngine(small(), [tenant("hog"), tenant("owner", guaranteed=50)])
    hogs = [engine.add("hog", 76, 200) for _ in range(3)]
    engine.run(6)
    assert held(engine, "hog") >= 58
    owner = engine.add("owner", 100, 4)
    engine.run(2)
    assert owner.started_at is not None
    assert held(engine, "owner") >= 25
    assert sum(hog.num_preemptions for hog in hogs) == 2, "no more victims than it takes"
    engine.drain()
    assert engine.finish_reason(owner) is FinishReason.STOP


def test_a_guarantee_is_not_reclaimed_from_another_guarantee() -> None:
    engine = PretendEngine(small(), [tenant("a", guaranteed=50), tenant("b", guaranteed=50)])
    engine.add("a", 124, 100)
    engine.run(3)
    b = engine.add("b", 120, 2)
    engine.run(3)
    assert held(engine, "a") >= 32 and b.started_at is not None
    assert engine.scheduler.num_preemptions == 0


def test_who_is_far_behind_is_served_by_preemption_after_the_minimum_run() -> None:
    engine = PretendEngine(small(), [tenant("greedy"), tenant("late", weight=4)])
    hogs = [engine.add("greedy", 76, 150) for _ in range(3)]
    engine.run(5)
    late = engine.add("late", 60, 4)
    engine.run(2)
    assert late.started_at is None, "the lag is not reached"
    engine.run(60)
    assert engine.finish_reason(late) is FinishReason.STOP
    preempted = [hog for hog in hogs if hog.num_preemptions]
    assert preempted
    assert all(hog.num_preemptions == 1 for hog in preempted)


def test_equals_never_preempt_each_other_in_turn() -> None:
    """Two floods in a cache that holds one of their prompts: whoever is ahead changes with every step."""
    engine = PretendEngine(small(num_kv_blocks=24, preemption_lag=0, min_run_seconds=0.0), [tenant("a"), tenant("b")])

    def flood() -> None:
        engine.keep("a", 3, 40, 8)
        engine.keep("b", 3, 40, 8)

    engine.run(2000, flood)
    num_finished = sum(engine.finish_reason(request) is FinishReason.STOP for request in engine.requests.values())
    assert engine.scheduler.num_preemptions < 0.5 * num_finished
    assert abs(engine.service("a") - engine.service("b")) <= 2 * 56 * 2


def test_a_preempted_request_keeps_its_place_and_its_tokens() -> None:
    engine = PretendEngine(small(), [tenant("hog"), tenant("owner", guaranteed=50)])
    first, second = engine.add("hog", 100, 30), engine.add("hog", 100, 30)
    engine.run(8)
    later = engine.add("hog", 100, 30)
    engine.add("owner", 100, 4)
    engine.drain()
    assert first.num_preemptions + second.num_preemptions >= 1
    for request in (first, second, later):
        assert engine.token_ids(request) == [engine.token(request, index) for index in range(30)]
        assert engine.outputs[request.request_id][-1].num_preemptions == request.num_preemptions
    ends = {request_id: number for number, request_id in enumerate(engine.outputs)}
    assert ends[later.request_id] > max(ends[first.request_id], ends[second.request_id])


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


def test_a_large_head_is_bypassed_a_bounded_number_of_times() -> None:
    engine = PretendEngine(small(max_bypasses=5, preemption_lag=1 << 40), [tenant("large"), tenant("small")])
    engine.keep("small", 12, 12, 8)
    engine.run(3)
    large = engine.add("large", 200, 2)
    num_before = len(engine.requests)
    for _ in range(500):
        engine.keep("small", 12, 12, 8)
        engine.step()
        if large.started_at is not None:
            break
    assert large.started_at is not None
    started_after = [r for r in list(engine.requests.values())[num_before:] if r.request_id in engine.outputs]
    assert len(started_after) <= 5 + 12, "only those already running, and five that passed it"


def test_nobody_starts_past_a_small_head() -> None:
    """It waits for few blocks, so that holding these wastes little; whoever passed it would keep them for long."""
    engine = PretendEngine(small(max_bypasses=5, preemption_lag=1 << 40, growth_blocks=0), [tenant("head")])
    engine.add("others", 148, 60)
    ends_soon = engine.add("others", 80, 12)
    engine.run(5)
    head = engine.add("head", 24, 2)
    tiny = engine.add("others", 4, 2)
    assert 3 < engine.scheduler.request_table.blocks.num_free_blocks < 7, "room for the tiny one alone"
    engine.run(5)
    assert engine.finish_reason(ends_soon) is None
    assert head.started_at is None and tiny.started_at is None
    engine.drain()
    assert engine.finish_reason(head) is engine.finish_reason(tiny) is FinishReason.STOP


def test_a_full_house_gives_a_seat_to_who_is_far_behind() -> None:
    engine = PretendEngine(small(max_num_seqs=2, num_kv_blocks=400), [tenant("a"), tenant("b")])
    engine.add("a", 20, 900)
    engine.add("a", 20, 900)
    engine.run(10)
    b = engine.add("b", 20, 3)
    engine.run(100)
    assert engine.finish_reason(b) is FinishReason.STOP


def test_fcfs_stops_at_the_first_prompt_without_room() -> None:
    engine = PretendEngine(small(scheduling_policy=SchedulingPolicy.FCFS), [tenant("a"), tenant("b")])
    engine.add("a", 200, 50)
    engine.run(4)
    blocked = engine.add("a", 200, 2)
    behind = engine.add("b", 8, 2)
    engine.run(5)
    assert blocked.started_at is None and behind.started_at is None
    engine.drain()


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


def test_an_admission_leaves_the_running_requests_room_to_grow() -> None:
    """Two closed loops in a full cache: without the room, nearly every admission is paid for with a preemption."""

    def preemptions(growth_blocks: float) -> int:
        engine = PretendEngine(small(growth_blocks=growth_blocks), [tenant("a"), tenant("b")])

        def flood() -> None:
            engine.keep("a", 16, 8, 40)
            engine.keep("b", 16, 8, 40)

        engine.run(1_000, flood)
        return engine.scheduler.num_preemptions

    assert preemptions(4.0) < 0.5 * preemptions(0.0)


def test_room_to_grow_is_not_asked_of_a_tenant_within_its_guarantee() -> None:
    engine = PretendEngine(small(growth_blocks=8), [tenant("hog"), tenant("owner", guaranteed=25)])
    engine.add("hog", 90, 200)
    engine.add("hog", 90, 200)
    engine.run(5)
    assert 8 < engine.scheduler.request_table.blocks.num_free_blocks < 8 + 2 * 8, (
        "enough for the prompt, not for the room too"
    )
    owner = engine.add("owner", 32, 4)
    engine.step()
    assert owner.started_at is not None
    assert engine.scheduler.num_preemptions == 0


def test_memory_held_for_a_large_head_does_not_hold_back_a_guarantee() -> None:
    tenants = [tenant("large", weight=1000), tenant("owner", guaranteed=25)]
    engine = PretendEngine(small(max_bypasses=0, preemption_lag=1 << 40), tenants)
    engine.add("large", 100, 60)
    engine.run(3)
    waiting = engine.add("large", 180, 2)
    engine.add("owner", 32, 4)
    engine.run(8)
    owner = engine.add("owner", 32, 4)  # ahead of the large one by weight, so that it is looked at last
    engine.run(3)
    assert waiting.started_at is None
    assert owner.started_at is not None


def test_a_preemption_for_service_clears_the_room_to_grow_too() -> None:
    settings = small(growth_blocks=20, preemption_lag=16, num_kv_blocks=100)
    engine = PretendEngine(settings, [tenant("greedy"), tenant("late")])
    for _ in range(3):
        engine.add("greedy", 64, 150)
        engine.run(10)
    late = engine.add("late", 16, 4)
    assert engine.scheduler.request_table.blocks.num_free_blocks > 4 + 16, "enough for the prompt for a long while"
    engine.run(25)
    assert engine.finish_reason(late) is FinishReason.STOP


def test_a_prefix_that_only_others_still_use_does_not_count_to_who_filled_it() -> None:
    """Else what another tenant of the sharing group runs would keep its first user at the ceiling, and cut its stream."""
    share = KvCacheShare(max_percent=50, prefix_sharing_group="group")
    tenants = [TenantConfig(tenant_id="first", kv_cache=share), TenantConfig(tenant_id="other", kv_cache=share)]
    engine = PretendEngine(small(), tenants)
    prefix = list(range(5000, 5096))
    filled = engine.add("first", 0, 6, prompt=[*prefix, 1, 2])
    engine.run(3)
    engine.add("other", 0, 60, prompt=[*prefix, 3, 4])
    engine.run(12)
    assert engine.finish_reason(filled) is FinishReason.STOP
    assert held(engine, "first") == 0 and held(engine, "other") >= 24
    stream = engine.add("first", 40, 60)
    engine.drain()
    assert engine.finish_reason(stream) is FinishReason.STOP
    assert len(engine.token_ids(stream)) == 60


def test_a_pause_ends_with_its_step_for_whoever_was_preempted_meanwhile() -> None:
    """What stayed paused could never compute again: the tenant has a prompt in progress, and none that may go on."""
    engine = PretendEngine(small(min_run_seconds=0.0), [tenant("a")])
    request = engine.add("a", 200, 4)
    engine.run(1)
    scheduler, preemption = engine.scheduler, engine.scheduler._preemption
    scheduler.ledger.limit = -1  # everybody is too far ahead
    preemption.pause(engine.now)
    assert list(scheduler.request_table.tenants["a"].in_progress()) == []
    scheduler.request_table.preempt(request)  # as for another's growth
    preemption.resume()
    scheduler.request_table.start(request, engine.now)  # as within a guarantee, before the next step's decisions
    assert list(scheduler.request_table.tenants["a"].in_progress()) == [request]
