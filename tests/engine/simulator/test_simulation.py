"""The simulation's clock, what it tells the scheduler and what it records, around the real Scheduler."""

from collections.abc import Sequence

import pytest

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.simulator.device import Device, LinearStepTime
from evenhand_engine.simulator.simulation import Run, Simulation, StuckError
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.config import KvCacheShare, SchedulerConfig, TenantConfig

SECOND_PER_STEP = Device("test", 1_000, LinearStepTime(1.0))


def scheduler(policy: str = "fair", *tenants: TenantConfig, **more: object) -> Scheduler:
    settings = SchedulerSettings(
        scheduling_policy=SchedulingPolicy(policy), max_num_batched_tokens=100, max_model_len=600, **more
    )  # type: ignore[arg-type]
    return Scheduler(settings, SchedulerConfig(tenants=tenants))


def run(trace: Sequence[TraceRequest], *tenants: TenantConfig, device: Device = SECOND_PER_STEP, **more: object) -> Run:
    return Simulation(scheduler("fair", *tenants, **more), device, trace, max_model_len=600).run()


def test_a_lone_request_takes_a_step_for_each_chunk_and_each_output() -> None:
    (record,) = run([TraceRequest("a", 5.0, 250, 4)]).records
    assert record.first_token_time == 8.0  # chunks of 100, 100, 50, each a second
    assert record.token_times is not None
    assert record.token_times.tolist() == [8.0, 9.0, 10.0, 11.0]
    assert record.finish_time == 11.0


def test_idle_time_is_skipped_and_steps_are_logged() -> None:
    result = run([TraceRequest("a", 0.5, 10, 2), TraceRequest("a", 1_000.0, 10, 1)])
    assert list(result.steps.starts) == [0.5, 1.5, 1_000.0]
    assert [(shape.num_prefill_tokens, shape.num_decode_tokens) for shape in result.steps.shapes] == [
        (10, 0),
        (0, 1),
        (10, 0),
    ]
    assert result.end_time == 1_001.0


def test_step_time_follows_the_shape() -> None:
    device = Device("test", 1_000, LinearStepTime(1.0, per_prefill_token=0.1, per_decode_context=0.01))
    (record,) = run([TraceRequest("a", 0.0, 20, 2)], device=device).records
    assert record.token_times is not None
    assert record.token_times.tolist() == pytest.approx([3.0, 4.2])  # 1 + 20 * 0.1, then 1 + 20 * 0.01


def test_beyond_the_threshold_the_large_step_counts() -> None:
    device = Device("test", 1_000, LinearStepTime(1.0), LinearStepTime(7.0), threshold=50)
    records = run([TraceRequest("a", 0.0, 50, 1), TraceRequest("a", 100.0, 51, 1)], device=device).records
    assert [record.first_token_time for record in records] == [1.0, 107.0]


class Spy(Scheduler):
    """Remembers what it was told of each request."""

    def add(self, request: Request, now: float) -> None:
        self.seen = [*getattr(self, "seen", []), (request.sampling_params.max_tokens, list(request.token_ids))]
        super().add(request, now)


def test_output_lengths_are_told_only_to_those_who_may_know() -> None:
    trace = [TraceRequest("a", 0.0, 40, 7)]
    told = []
    for lengths_known in (False, True):
        spy = Spy(SchedulerSettings(max_model_len=600), SchedulerConfig())
        (record,) = (
            Simulation(spy, SECOND_PER_STEP, trace, max_model_len=600, lengths_known=lengths_known).run().records
        )
        told.append(spy.seen[0][0])
        assert record.token_times is not None and len(record.token_times) == 7
    assert told == [560, 7]


def test_prompts_share_no_token_but_their_prefix() -> None:
    spy = Spy(SchedulerSettings(max_model_len=600), SchedulerConfig())
    trace = [
        TraceRequest("a", 0.0, 40, 1, prefix="system", num_prefix_tokens=30),
        TraceRequest("b", 0.0, 50, 1, prefix="system", num_prefix_tokens=30),
        TraceRequest("b", 0.0, 50, 1),
    ]
    Simulation(spy, SECOND_PER_STEP, trace, max_model_len=600).run()
    first, second, third = (tokens for _, tokens in spy.seen)
    assert first[:30] == second[:30]
    assert len({*first, *second, *third}) == 40 + 20 + 50


def test_a_shared_prefix_is_computed_once() -> None:
    trace = [TraceRequest("a", float(10 * i), 64, 1, prefix="system", num_prefix_tokens=48) for i in range(3)]
    records = run(trace).records
    assert [record.num_cached_tokens for record in records] == [0, 48, 48]


def test_what_the_scheduler_refuses_is_not_served() -> None:
    capped = TenantConfig(tenant_id="small", kv_cache=KvCacheShare(max_percent=10))
    trace = [TraceRequest("small", 0.0, 200, 1), TraceRequest("other", 0.0, 200, 1)]  # 200 tokens: 13 of 20 blocks
    records = run(trace, capped, num_kv_blocks=20, block_size=16).records
    assert [record.is_served for record in records] == [False, True]


def test_preemptions_are_recorded_and_every_token_still_comes() -> None:
    trace = [TraceRequest(f"t{i}", 0.0, 90, 60) for i in range(4)]
    records = run(trace, *(TenantConfig(tenant_id=f"t{i}") for i in range(4)), num_kv_blocks=30).records
    assert sum(record.num_preemptions for record in records) > 0
    assert all(record.token_times is not None and len(record.token_times) == 60 for record in records)


def test_until_ends_the_run_and_leaves_the_rest_unserved() -> None:
    result = Simulation(scheduler(), SECOND_PER_STEP, [TraceRequest("a", 0.0, 10, 50)], max_model_len=600).run(
        until=5.0
    )
    (record,) = result.records
    assert (record.is_served, record.first_token_time, result.end_time) == (False, 1.0, 5.0)


def test_static_batches_run_to_the_end_of_their_longest_request() -> None:
    trace = [TraceRequest("a", 0.0, 1, outputs) for outputs in (10, 2, 7, 3)]
    ends = {
        policy: Simulation(scheduler(policy, max_num_seqs=2), SECOND_PER_STEP, trace, max_model_len=600).run().end_time
        for policy in ("static", "fcfs")
    }
    assert ends == {"static": 10 + 7, "fcfs": 2 + 7 + 3}  # the 10 runs beside the others


class Lazy(Scheduler):
    """Schedules nothing."""

    def step(self, now: float) -> Batch | None:
        return None


def test_a_scheduler_that_strands_requests_is_an_error() -> None:
    lazy = Lazy(SchedulerSettings(), SchedulerConfig())
    with pytest.raises(StuckError, match="1 requests wait"):
        Simulation(lazy, SECOND_PER_STEP, [TraceRequest("a", 0.0, 10, 5)], max_model_len=600).run()
