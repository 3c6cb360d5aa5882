"""Latency classes, deadlines and inter-token objectives: they decide when inside the bound, never how much."""

import pytest

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.pace import StepBudget
from evenhand_engine.scheduler.step_time import StepShape, StepTimeModel
from evenhand_policy.config import Fairness, LatencyClass, Slo, TenantConfig

from .conftest import PretendEngine

SETTINGS = SchedulerSettings(max_num_batched_tokens=64, num_kv_blocks=4096, block_size=4)


def tenant(tenant_id: str, latency_class: LatencyClass = LatencyClass.STANDARD, **slo: int) -> TenantConfig:
    return TenantConfig(tenant_id=tenant_id, latency_class=latency_class, slo=Slo(**slo))


def first_start(engine: PretendEngine) -> list[str]:
    """Tenants in the order in which their first requests started."""
    return list(dict.fromkeys(request_id.split("-")[0] for request_id in engine.outputs))


def test_the_higher_class_goes_first_among_equals() -> None:
    tenants = [tenant("batch", LatencyClass.BATCH), tenant("standard"), tenant("chat", LatencyClass.INTERACTIVE)]
    engine = PretendEngine(SETTINGS, tenants)
    for config in tenants:
        engine.add(config.tenant_id, 64, 2)
    engine.drain()
    assert first_start(engine) == ["chat", "standard", "batch"]


def test_the_nearer_deadline_goes_first_within_a_class() -> None:
    slow, fast = tenant("slow", time_to_first_token_ms=90_000), tenant("fast", time_to_first_token_ms=5_000)
    engine = PretendEngine(SETTINGS, [slow, fast, tenant("none")])
    for tenant_id in ("none", "slow", "fast"):
        engine.add(tenant_id, 64, 2)
    engine.drain()
    assert first_start(engine) == ["fast", "slow", "none"]


def test_a_class_never_takes_more_than_its_share() -> None:
    engine = PretendEngine(SETTINGS, [tenant("chat", LatencyClass.INTERACTIVE), tenant("batch", LatencyClass.BATCH)])

    def flood() -> None:
        engine.keep("chat", 16, 100, 4)
        engine.keep("batch", 16, 100, 4)

    services = engine.services(1000, flood)
    assert services["chat"] / sum(services.values()) == pytest.approx(0.5, abs=0.01)
    ahead = [engine.service("chat") - engine.service("batch") for _ in range(200) if engine.run(1, flood) is None]
    assert max(ahead) <= 2 * 64 * 2, "ahead by no more than the slack and a step"


def test_users_of_one_tenant_share_it_evenly() -> None:
    engine = PretendEngine(SETTINGS, [TenantConfig(tenant_id="team", fairness=Fairness.PER_USER)])
    served = dict.fromkeys(("greedy", "modest"), 0)

    def flood() -> None:
        live = engine.scheduler.request_table.requests.values()
        for user, count in (("greedy", 30), ("modest", 3)):
            for _ in range(count - sum(request.user == user for request in live)):
                engine.add("team", 100, 4, user=user)

    engine.run(600, flood)
    for request in engine.requests.values():
        served[request.user] += request.num_charged_tokens + 2 * request.num_output_tokens
    assert served["modest"] / sum(served.values()) == pytest.approx(0.5, abs=0.02)


def test_an_inter_token_objective_bounds_the_step_of_everybody() -> None:
    """A step of n tokens takes 10 + n ms here; with an objective of 50 ms 40 tokens fit."""
    settings = SchedulerSettings(max_num_batched_tokens=1000, num_kv_blocks=4096, block_size=4)
    engine = PretendEngine(settings, [tenant("chat", inter_token_latency_ms=50), tenant("batch")])

    def one_step() -> int:
        engine.keep("batch", 4, 2000, 4)
        num_before = len(engine.batches)
        scheduler_step = engine.scheduler.step

        def timed_step(now: float) -> object:
            batch = scheduler_step(now)
            engine.step_seconds = 0.010 + 0.001 * (batch.num_tokens if batch else 0)
            return batch

        engine.scheduler.step = timed_step  # type: ignore[assignment, method-assign]
        engine.step()
        engine.scheduler.step = scheduler_step  # type: ignore[method-assign]
        return engine.batches[num_before].num_tokens

    unbound = [one_step() for _ in range(20)]
    assert max(unbound) == 1000
    engine.add("chat", 10, 60)
    sizes = [one_step() for _ in range(40)]
    assert min(sizes[10:]) >= 25 and max(sizes[10:]) <= 40
    while any(request.tenant_id == "chat" for request in engine.scheduler.request_table.requests.values()):
        one_step()
    ended_at = engine.now
    while engine.now < ended_at + 0.9:
        assert one_step() <= 40, "the next turn must not meet a long step"
    while engine.now < ended_at + 1.1:
        one_step()
    assert one_step() == 1000


def test_the_baselines_know_no_objective() -> None:
    settings = SchedulerSettings(max_num_batched_tokens=64, num_kv_blocks=4096, scheduling_policy=SchedulingPolicy.FCFS)
    engine = PretendEngine(settings, [tenant("chat", inter_token_latency_ms=1), tenant("batch")])
    engine.add("chat", 1, 50)
    engine.run(3, lambda: engine.keep("batch", 2, 2000, 4))
    assert engine.batches[-1].num_tokens == 64


class TestStepTimeModel:
    """Fit and inversion of the linear model."""

    def fitted(self) -> StepTimeModel:
        model = StepTimeModel()
        for index in range(200):
            decodes = index % 7
            shape = StepShape().with_decodes(decodes, decodes * (300 + 17 * index))
            shape = shape.with_chunk(1 + (index * 53) % 400, (index * 37) % 1500)
            num_tokens = shape.num_decode_tokens + shape.num_prefill_tokens
            model.observe(shape, 0.02 + 1e-3 * num_tokens + 1e-6 * shape.decode_context + 2e-7 * shape.prefill_pairs)
        return model

    def test_it_recovers_the_coefficients(self) -> None:
        assert self.fitted().coefficients == pytest.approx((0.02, 1e-3, 1e-6, 2e-7), rel=0.02)

    @pytest.mark.parametrize("context", [0, 100, 5000, 100_000])
    @pytest.mark.parametrize("max_seconds", [0.03, 0.1, 1.0])
    def test_what_fits_is_the_most_that_fits(self, context: int, max_seconds: float) -> None:
        model = self.fitted()
        budget = StepBudget(100_000, model, [max_seconds], 1)
        num_tokens = budget.fit(context, 100_000)

        def seconds(num_tokens: int) -> float:
            return model.predict(StepShape().with_chunk(num_tokens, context))

        assert num_tokens >= 1
        assert num_tokens == 1 or seconds(num_tokens) <= max_seconds * 1.002
        assert seconds(num_tokens + 2) > max_seconds * 0.998

    def test_prompts_have_a_floor_of_their_own(self) -> None:
        """Twenty streams leave next to nothing of the objective: prompts advance by 16 tokens all the same."""
        model = self.fitted()
        budget = StepBudget(1000, model, [model.predict(StepShape().with_decodes(20, 20_000)) + 1e-4], 16)
        budget.spend_decodes(20, 20_000)
        assert budget.fit(0, 500) == 16
        budget.spend(0, 10)
        assert budget.fit(0, 500) == 6

    def test_an_objective_that_streams_alone_miss_does_not_bind_prompts(self) -> None:
        model = self.fitted()
        seconds = model.predict(StepShape().with_decodes(20, 20_000))
        budget = StepBudget(1000, model, [seconds - 1e-3, seconds + 0.1], 16)
        budget.spend_decodes(20, 20_000)
        assert 16 < budget.fit(0, 1000) < 200, "the other one does"
        budget = StepBudget(1000, model, [seconds - 1e-3], 16)
        budget.spend_decodes(20, 20_000)
        assert budget.fit(0, 1000) == 980

    def test_tokens_that_seem_to_cost_nothing_are_bounded_by_what_is_pending(self) -> None:
        model = StepTimeModel()
        for index in range(50):
            model.observe(StepShape().with_chunk(1 + index, 0), 1e-310 * index)
        assert StepBudget(10_000, model, [1.0], 16).fit(0, 500) == 500

    def test_without_an_objective_only_tokens_count(self) -> None:
        budget = StepBudget(100, self.fitted(), [], 16)
        assert budget.fit(0, 500) == 100
        budget.spend(0, 60)
        assert budget.fit(0, 500) == 40
