"""The bound of docs/fairness.md, on random floods, and mutants of the rules that it must catch.

Two tenants are backlogged throughout, whatever their prompts, outputs, weights and classes. The weighted service of one
may run ahead of the other's by no more than the bound; the bound is a function of the settings, not of time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.fair_queue import FairQueue
from evenhand_engine.fair_share import FairShare
from evenhand_engine.request import Request
from evenhand_engine.roster import Fit
from evenhand_engine.scheduler import Scheduler
from evenhand_engine.tenant import Tenant
from evenhand_policy.config import LatencyClass, TenantConfig

from .conftest import PretendEngine

INPUT_PRICE, OUTPUT_PRICE = 1, 2
CHUNK = 32
LONGEST_PROMPT, LONGEST_OUTPUT = 60, 60
LAG = 48


@dataclass(frozen=True)
class Flood:
    """A closed loop of one tenant: it always has `num_requests` in the engine."""

    weight: int
    latency_class: LatencyClass
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int


floods = st.builds(
    Flood,
    weight=st.integers(1, 4),
    latency_class=st.sampled_from(LatencyClass),
    num_requests=st.integers(24, 40),
    num_prompt_tokens=st.integers(1, LONGEST_PROMPT),
    num_output_tokens=st.integers(2, LONGEST_OUTPUT),
)


def bound(engine: PretendEngine) -> float:
    """Most by which one backlogged tenant's weighted service may run ahead of another's; docs/fairness.md."""
    tenants = engine.scheduler.roster.tenants.values()
    lightest = min(tenant.weight for tenant in tenants)
    most_running = engine.settings.max_num_seqs
    slack = CHUNK * OUTPUT_PRICE  # in virtual service already
    one_step = CHUNK * INPUT_PRICE + most_running * OUTPUT_PRICE
    lag = LONGEST_PROMPT * INPUT_PRICE + LAG
    bypasses = engine.settings.max_bypasses * LONGEST_PROMPT * INPUT_PRICE
    handover = OUTPUT_PRICE * most_running * (most_running + 2) // 4  # one request is preempted a step
    return 2 * (slack + (one_step + lag + handover + bypasses) / lightest)


class Meter:
    """What tenants received, counted by the outputs alone: the prompt with the first token, each token as it comes."""

    def __init__(self, engine: PretendEngine) -> None:
        self._engine = engine
        self._open: dict[str, Request] = {}
        self._num_seen = 0
        self._settled = {"first": 0, "second": 0}

    def read(self) -> dict[str, int]:
        requests = list(self._engine.requests.values())
        self._open |= {request.request_id: request for request in requests[self._num_seen :]}
        self._num_seen = len(requests)
        received = dict(self._settled)
        for request in list(self._open.values()):
            outputs = request.num_output_tokens
            service = (request.num_prompt_tokens * INPUT_PRICE if outputs else 0) + outputs * OUTPUT_PRICE
            received[request.tenant_id] += service
            if request.finish_reason is not None:
                self._settled[request.tenant_id] += service
                del self._open[request.request_id]
        return received


def spread_of(engine: PretendEngine, floods: dict[str, Flood], num_steps: int = 400) -> float:
    """Range over time of the difference of two weighted services, both tenants being backlogged."""
    meter, differences = Meter(engine), []
    for step in range(num_steps):
        for name, flood in floods.items():
            engine.keep(name, flood.num_requests, flood.num_prompt_tokens, flood.num_output_tokens)
        engine.step()
        if step >= 2:
            received = meter.read()
            differences.append(
                received["first"] / floods["first"].weight - received["second"] / floods["second"].weight
            )
    return max(differences) - min(differences)


def engine_for(floods: dict[str, Flood], num_kv_blocks: int = 100) -> PretendEngine:
    made = SchedulerSettings(
        max_num_batched_tokens=CHUNK,
        max_num_seqs=16,
        max_model_len=128,
        num_kv_blocks=num_kv_blocks,
        block_size=4,
        preemption_lag=LAG,
        min_run_seconds=0.0,
        max_preemptions=1 << 20,
        enable_prefix_caching=False,
    )
    tenants = [
        TenantConfig(tenant_id=name, weight=flood.weight, latency_class=flood.latency_class)
        for name, flood in floods.items()
    ]
    return PretendEngine(made, tenants)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(first=floods, second=floods, num_kv_blocks=st.integers(60, 300))
@example(  # seats go over from one tenant to the other one a step, while the lead grows
    first=Flood(1, LatencyClass.INTERACTIVE, 24, 1, 42),
    second=Flood(1, LatencyClass.STANDARD, 24, 1, 47),
    num_kv_blocks=164,
)
def test_the_weighted_services_of_backlogged_tenants_stay_within_the_bound(
    first: Flood, second: Flood, num_kv_blocks: int
) -> None:
    pair = {"first": first, "second": second}
    engine = engine_for(pair, num_kv_blocks)
    assert spread_of(engine, pair) <= bound(engine)


# What each rule is for, and what breaks without it. Every case holds with the rules as they are.

BATCH, INTERACTIVE = LatencyClass.BATCH, LatencyClass.INTERACTIVE
LONG = Flood(1, BATCH, 30, 4, 60)
SHORT = Flood(1, INTERACTIVE, 30, 32, 2)
LARGE = Flood(1, BATCH, 30, 60, 60)


def classes_spread(num_steps: int = 400) -> float:
    pair = {"first": SHORT, "second": LONG}
    engine = engine_for(pair)
    return spread_of(engine, pair, num_steps) / bound(engine)


def returning_spread() -> float:
    """The second tenant floods alone for a while; then the first returns."""
    pair = {"first": SHORT, "second": LONG}
    engine = engine_for(pair)
    for _ in range(400):
        engine.keep("second", LONG.num_requests, LONG.num_prompt_tokens, LONG.num_output_tokens)
        engine.step()
    return spread_of(engine, pair) / bound(engine)


def recompute_spread() -> float:
    """A cache so small that the tenant with large requests is preempted all the time."""
    pair = {"first": SHORT, "second": LARGE}
    engine = engine_for(pair, num_kv_blocks=60)
    return spread_of(engine, pair, 3_000) / bound(engine)


def late_charge_spread() -> float:
    pair = {"first": SHORT, "second": Flood(1, BATCH, 40, 2, 120)}
    engine = engine_for(pair, num_kv_blocks=400)
    return spread_of(engine, pair) / bound(engine)


def no_lift(self: FairShare, left_out: Sequence[str]) -> None:
    """Virtual time stands still: silence banks credit."""


def charged_again(self: FairQueue, tenant: Tenant, request: Request, start: int, end: int) -> None:
    """Recomputed tokens cost as much as new ones."""
    num_tokens = end - start
    recomputed = min(num_tokens, max(0, request.num_charged_tokens - start))
    outputs = max(0, num_tokens - recomputed) if request.num_preemptions else 0
    self._charge(tenant, (request,), recomputed * INPUT_PRICE + outputs * OUTPUT_PRICE)
    CHARGE_PROMPT(self, tenant, request, start, end)


def charged_at_the_end(self: FairQueue, tenant: Tenant, requests: Sequence[Request], count: int = 1) -> None:
    """Outputs are charged when a request ends."""


def finished_and_charged(self: Scheduler, request: Request, token_id: int) -> None:
    TAKE_TOKEN(self, request, token_id)
    if request.finish_reason is not None:
        tenant = self.roster.tenants[request.tenant_id]
        self.queue._charge(tenant, (request,), OUTPUT_PRICE * request.num_output_tokens)


CHARGE_PROMPT, TAKE_TOKEN = FairQueue.charge_prompt, Scheduler._take_token


def test_without_the_lift_silence_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert returning_spread() <= 1.0
    monkeypatch.setattr(FairShare, "close_step", no_lift)
    assert returning_spread() > 1.0


def test_charging_recompute_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recompute_spread() <= 1.0
    monkeypatch.setattr(FairQueue, "charge_prompt", charged_again)
    assert recompute_spread() > 1.0


def test_charging_at_the_end_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert late_charge_spread() <= 1.0
    monkeypatch.setattr(FairQueue, "charge_outputs", charged_at_the_end)
    monkeypatch.setattr(Scheduler, "_take_token", finished_and_charged)
    assert late_charge_spread() > 1.0


def test_a_class_beyond_the_slack_breaks_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classes_spread() <= 1.0
    monkeypatch.setattr(FairQueue, "_slack", 1 << 60)
    assert classes_spread() > 1.0


def test_stopping_at_the_first_misfit_wastes_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large head that is first in line and does not fit, beside small prompts that do."""

    def served_beside_it() -> int:
        pair = {"first": Flood(1, BATCH, 1, 100, 100), "second": Flood(1, BATCH, 1, 4, 4)}
        engine = engine_for(pair, num_kv_blocks=50)
        engine.add("first", 100, 28)
        engine.run(5)
        engine.add("first", 100, 4)
        small = [engine.add("second", 4, 2) for _ in range(3)]
        engine.run(8)
        return sum(request.finish_reason is not None for request in small)

    assert served_beside_it() == 3
    fit = type(engine_for({"first": LONG, "second": LONG}).scheduler.roster).fit

    def stop(roster: object, request: Request) -> Fit:
        found = fit(roster, request)  # type: ignore[arg-type]
        stopped.append(found is Fit.STARVED)
        return Fit.STARVED if any(stopped) else found

    stopped: list[bool] = []
    monkeypatch.setattr("evenhand_engine.roster.Roster.fit", stop)
    assert served_beside_it() < 3
