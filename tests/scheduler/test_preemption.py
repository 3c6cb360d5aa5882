"""Who gives way, to whom, and what it keeps."""

from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import KvCacheShare, TenantConfig

from .conftest import PretendEngine
from .small_cache import held, small, tenant


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


def test_a_full_house_gives_a_seat_to_who_is_far_behind() -> None:
    engine = PretendEngine(small(max_num_seqs=2, num_kv_blocks=400), [tenant("a"), tenant("b")])
    engine.add("a", 20, 900)
    engine.add("a", 20, 900)
    engine.run(10)
    b = engine.add("b", 20, 3)
    engine.run(100)
    assert engine.finish_reason(b) is FinishReason.STOP


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
