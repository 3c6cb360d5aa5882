"""The default step: prompts make no step longer where no policy sets an objective, and no stream waits for it."""

from dataclasses import replace

import numpy as np

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.simulator.device import DEVICES, LinearStepTime
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.config import Slo, TenantConfig

from .conftest import PretendEngine

SETTINGS = SchedulerSettings(
    max_num_batched_tokens=1000, num_kv_blocks=4096, block_size=4, max_num_seqs=64, target_step_seconds=0.05
)


def engine_of(settings: SchedulerSettings, objective_ms: int | None = None) -> PretendEngine:
    """A step of n tokens takes 10 + n ms: 40 fit into 50."""
    tenant = TenantConfig(tenant_id="one", slo=Slo(inter_token_latency_ms=objective_ms))
    engine = PretendEngine(settings, [tenant])
    engine.step_time = LinearStepTime(0.010, per_token=0.001)
    return engine


def sizes(engine: PretendEngine) -> list[int]:
    """Of steps beside a stream and prompts that never end, once step times are known."""
    engine.add("one", 10, 600)
    engine.run(60, lambda: engine.keep("one", 4, 2000, 4))
    return [batch.num_tokens for batch in engine.batches[20:]]


def test_prompts_make_no_step_longer() -> None:
    found = sizes(engine_of(SETTINGS))
    assert min(found) >= 25 and max(found) <= 40


def test_a_policy_that_sets_an_objective_is_not_held_to_it() -> None:
    assert max(sizes(engine_of(SETTINGS, objective_ms=200))) == 190


def test_nothing_else_knows_it() -> None:
    assert max(sizes(engine_of(replace(SETTINGS, target_step_seconds=None)))) == 1000
    assert max(sizes(engine_of(replace(SETTINGS, scheduling_policy=SchedulingPolicy.FCFS)))) == 1000


def test_no_stream_waits_for_it() -> None:
    """Sixty streams take 70 ms by themselves."""
    engine = engine_of(SETTINGS)
    for _ in range(60):
        engine.add("one", 10, 200)
    engine.run(150)
    assert all(batch.num_tokens == 60 for batch in engine.batches[100:])


def test_it_costs_little_of_the_throughput_where_steps_cost_little() -> None:
    """Prompts of 1,000 tokens beside streams, on a machine whose step costs 5 ms and each token 0.5: steps of at most 0.2 s
    instead of 1.0, for 2 % of the tokens."""
    device = replace(DEVICES["cpu-135m"], small_step=LinearStepTime(0.005, per_token=5e-4), max_num_batched_tokens=2048)
    trace = [TraceRequest("flood", 0.0, 1000, 60) for _ in range(400)]
    made = Scenario.of_trace(trace, device).with_settings(num_kv_blocks=16_384)
    free = made.run("fair")
    bound = made.with_settings(target_step_seconds=0.2).run("fair")
    assert longest_gap(free) > 0.9
    assert longest_gap(bound) < 0.21
    assert bound.end_time < 1.02 * free.end_time


def test_by_default_it_gives_way_where_steps_cost_much() -> None:
    """A step costs 32 ms and each token 2.5, as with float32 weights on two old cores: 200 ms would cost a tenth."""
    device = replace(
        DEVICES["cpu-135m"], small_step=LinearStepTime(0.032, per_token=2.5e-3), max_num_batched_tokens=256
    )
    trace = [TraceRequest("flood", 0.0, 1000, 60) for _ in range(100)]
    made = Scenario.of_trace(trace, device).with_settings(num_kv_blocks=16_384)
    free = made.run("fair")
    asked = made.with_settings(target_step_seconds=0.2).run("fair")
    default = made.with_settings(target_step_seconds=0.2, target_step_cost=0.015).run("fair")
    assert longest_gap(asked) < 0.21 and asked.end_time > 1.08 * free.end_time
    assert longest_gap(default) < 0.55 < 0.65 < longest_gap(free) and default.end_time < 1.02 * free.end_time


def longest_gap(run: Run) -> float:
    """Seconds between two tokens of any stream."""
    return max(float(np.diff(record.token_times).max()) for record in run.records if record.token_times is not None)
