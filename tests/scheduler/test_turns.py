"""Whose streams compute when there is no room for all: in order of virtual service, and never for who is ahead."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from evenhand_engine.scheduler.pace import StepBudget
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.step_time import StepShape, StepTimeModel
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_engine.scheduler.turns import Turns, take_turns
from evenhand_policy.config import Slo, TenantConfig

PER_STEP, PER_TOKEN, PER_CONTEXT = 0.05, 0.01, 1e-4
NEVER = float("inf")


def fitted() -> StepTimeModel:
    model = StepTimeModel()
    for index in range(100):
        num_tokens, context = 1 + index * 7 % 30, index * 131 % 5000
        shape = StepShape().with_decodes(num_tokens, context)
        model.observe(shape, PER_STEP + PER_TOKEN * num_tokens + PER_CONTEXT * context)
    return model


MODEL = fitted()


@dataclass
class Streams:
    """Tenants with their virtual services before the step and their streams' contexts."""

    tenants: list[Tenant]
    services: dict[str, int]

    def take(self, num_tokens: int) -> Turns:
        objectives = [t.inter_token_latency for t in self.tenants if t.inter_token_latency != NEVER]
        budget = StepBudget(num_tokens, MODEL, objectives, 16)
        return take_turns(self.tenants, budget, lambda tenant: self.services[tenant.tenant_id], cost)

    def after(self, tenant: Tenant, requests: list[Request]) -> int:
        return self.services[tenant.tenant_id] + sum(cost(tenant, request) for request in requests)


def cost(tenant: Tenant, request: Request) -> int:
    return (2000 + request.num_computed_tokens) // tenant.weight


def streaming(name: str, weight: int, objective_ms: int | None, contexts: list[int]) -> Tenant:
    config = TenantConfig(tenant_id=name, weight=weight, slo=Slo(inter_token_latency_ms=objective_ms))
    tenant = Tenant(config, num_kv_blocks=100, num_replicas=1)
    for number, context in enumerate(contexts):
        request = Request(f"{name}-{number}", name, [1], SamplingParams(max_tokens=1 << 20), 0.0)
        request.num_computed_tokens = context
        tenant.decoding[request.request_id] = request
    return tenant


@st.composite
def streams(draw: st.DrawFn) -> Streams:
    tenants = [
        streaming(
            f"tenant{index}",
            draw(st.sampled_from((1, 2, 10, 100))),
            draw(st.none() | st.integers(50, 1000)),
            draw(st.lists(st.integers(0, 3000), min_size=1, max_size=8)),
        )
        for index in range(draw(st.integers(1, 5)))
    ]
    return Streams(tenants, {tenant.tenant_id: draw(st.integers(0, 20_000)) for tenant in tenants})


@given(streams(), st.integers(1, 60))
def test_nobody_passes_who_waits_and_only_who_is_ahead_waits_for_an_objective(case: Streams, num_tokens: int) -> None:
    turns = case.take(num_tokens)
    taken = {tenant.tenant_id: requests for tenant, requests in turns.taken}
    num_taken = sum(map(len, taken.values()))
    assert 1 <= num_taken <= num_tokens
    ends = {tenant.tenant_id: case.after(tenant, tenant.decodes()) for tenant in case.tenants}
    owners = [tenant for tenant in case.tenants if tenant.inter_token_latency != NEVER]
    for tenant in case.tenants:
        requests, own = tenant.decodes(), taken.get(tenant.tenant_id, [])
        assert own == requests[: len(own)], "in turn"
        assert (len(own) < len(requests)) == (tenant.tenant_id in turns.left_out)
        if len(own) == len(requests):
            continue
        would_reach = case.after(tenant, requests[: len(own) + 1])
        assert all(case.after(other, requests) <= would_reach for other, requests in turns.taken)
        assert num_taken == num_tokens or any(ends[owner.tenant_id] < would_reach for owner in owners)


@given(streams())
def test_with_room_for_all_nobody_waits(case: Streams) -> None:
    everything = [request for tenant in case.tenants for request in tenant.decodes()]
    context = sum(request.num_computed_tokens for request in everything)
    if MODEL.predict(StepShape().with_decodes(len(everything), context)) > min(
        tenant.inter_token_latency for tenant in case.tenants
    ):
        return
    turns = case.take(60)
    assert not turns.left_out
    assert [request for _, requests in turns.taken for request in requests] == everything


def test_a_step_is_filled_as_far_as_the_objective_allows() -> None:
    owner, flood = streaming("owner", 4, 300, [0]), streaming("flood", 1, None, [1000] * 8)
    turns = Streams([owner, flood], {"owner": 0, "flood": 0}).take(60)
    assert [len(requests) for _, requests in turns.taken] == [1, 2], "0.05 + 0.01 + 2 * 0.11 seconds"
    owner.configure(TenantConfig(tenant_id="owner", weight=4), num_kv_blocks=100, num_replicas=1)
    assert not Streams([owner, flood], {"owner": 0, "flood": 0}).take(60).left_out


def test_those_who_computed_go_to_the_end_of_their_tenants_line() -> None:
    flood = streaming("flood", 1, None, [1000] * 5)
    names = [request.request_id for request in flood.decodes()]
    flood.end_turns(flood.decodes()[:2])
    assert [request.request_id for request in flood.decodes()] == names[2:] + names[:2]
