"""Room for prompts: which wait for it, who may start past them, and what is left for those that run to grow."""

from evenhand_engine.config import SchedulingPolicy
from evenhand_engine.scheduler.request import FinishReason

from .conftest import PretendEngine
from .small_cache import small, tenant


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


def test_fcfs_stops_at_the_first_prompt_without_room() -> None:
    engine = PretendEngine(small(scheduling_policy=SchedulingPolicy.FCFS), [tenant("a"), tenant("b")])
    engine.add("a", 200, 50)
    engine.run(4)
    blocked = engine.add("a", 200, 2)
    behind = engine.add("b", 8, 2)
    engine.run(5)
    assert blocked.started_at is None and behind.started_at is None
    engine.drain()


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
