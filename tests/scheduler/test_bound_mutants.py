"""Cases that the bound of docs/fairness.md has caught: mutants of the rules, and what a search found."""

from collections.abc import Callable, Sequence

import pytest

from evenhand_engine.scheduler.capacity import Fit, KvCapacity
from evenhand_engine.scheduler.fair_share import FairShare
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.order import Order
from evenhand_engine.scheduler.preemption import Preemption
from evenhand_engine.scheduler.request import FinishReason, Request, Sampled
from evenhand_engine.scheduler.results import Results
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_engine.scheduler.tenant_queue import TenantQueue
from evenhand_policy.config import (
    Fairness,
    LatencyClass,
    Prices,
    Slo,
    TenantConfig,
)

from .conftest import PretendEngine
from .trial import CHUNK, INPUT_PRICE, OUTPUT_PRICE, STEP_TIME, Flood, Trial, settings_for

# -- what each rule is for, and what breaks without it; every case holds with the rules as they are
BATCH, INTERACTIVE = LatencyClass.BATCH, LatencyClass.INTERACTIVE
LONG, SHORT, LARGE = Flood(30, 4, 60), Flood(30, 32, 2), Flood(30, 60, 60)
SHORT_BESIDE_LONG = {"first": SHORT, "second": LONG}


def pair(floods: dict[str, Flood], *, fairness: Fairness = Fairness.FIFO, **changes: int) -> Trial:
    classes = {"first": INTERACTIVE, "second": BATCH}
    configs = {name: TenantConfig(tenant_id=name, latency_class=classes[name], fairness=fairness) for name in floods}
    return Trial(PretendEngine(settings_for(**changes), configs.values()), configs, floods)


def worst_of(trial: Trial, num_steps: int = 400) -> float:
    trial.run(num_steps)
    return trial.worst


def returning() -> float:
    """The second tenant floods alone for a while; then the first returns."""
    trial = pair(SHORT_BESIDE_LONG)
    trial.floods = {"second": LONG}
    trial.run(400)
    trial.floods = SHORT_BESIDE_LONG
    return worst_of(trial)


def recompute() -> float:
    """A cache so small that the tenant with large requests is preempted all the time."""
    return worst_of(pair({"first": SHORT, "second": LARGE}, num_kv_blocks=60), 3_000)


def late_charge() -> float:
    return worst_of(pair({"first": SHORT, "second": Flood(40, 2, 120)}, num_kv_blocks=400))


def classes() -> float:
    return worst_of(pair(SHORT_BESIDE_LONG))


def full_house() -> float:
    """The second tenant has all seats, and most outputs of its requests still to come, when the first arrives."""
    trial = pair({"first": SHORT, "second": Flood(40, 2, 120)}, num_kv_blocks=600)
    trial.floods, both = {"second": trial.floods["second"]}, trial.floods
    trial.run(50)
    trial.floods = both
    return worst_of(trial)


def reserved_seats() -> float:
    """The same with seats of which one is left to tenants with few; both have many before long."""
    trial = pair({"first": SHORT, "second": Flood(80, 2, 120)}, num_kv_blocks=1_200, max_num_seqs=32)
    trial.floods, both = {"second": trial.floods["second"]}, trial.floods
    trial.run(50)
    trial.floods = both
    return worst_of(trial)


def scarce_budget_trial() -> Trial:
    """Seats and memory are free, so that nothing is preempted; a heavy tenant's prompts compete with running decodes."""
    trial = pair({"first": Flood(30, 60, 2), "second": Flood(40, 20, 100)}, num_kv_blocks=2_000, max_num_seqs=64)
    trial.configs["first"] = TenantConfig(tenant_id="first", weight=100)
    trial.reconfigure(trial.configs)
    trial.floods, both = {"second": trial.floods["second"]}, trial.floods
    trial.run(12)
    trial.floods = both
    return trial


def scarce_budget() -> float:
    return worst_of(scarce_budget_trial())


def objective_trial(objective_ms: int, weights: dict[str, int], floods: dict[str, Flood]) -> Trial:
    """The first tenant has an inter-token objective; a step takes longer the more streams compute in it."""
    configs = {name: TenantConfig(tenant_id=name, weight=weight) for name, weight in weights.items()}
    configs["first"] = TenantConfig(
        tenant_id="first", weight=weights["first"], slo=Slo(inter_token_latency_ms=objective_ms)
    )
    engine = PretendEngine(settings_for(1_000), configs.values())
    engine.step_time = STEP_TIME
    return Trial(engine, configs, floods)


def prompts_beside_turns() -> float:
    """The second tenant's streams wait for the first one's objective, while the third one's prompts need not."""
    floods = {"first": Flood(2, 4, 60), "second": Flood(4, 4, 60), "third": Flood(30, 32, 1)}
    return worst_of(objective_trial(200, {"first": 100, "second": 1, "third": 1}, floods), 1_000)


def contexts() -> float:
    """Equal tokens, unequal contexts, at a price."""
    configs = {name: TenantConfig(tenant_id=name) for name in ("first", "second")}
    engine = PretendEngine(settings_for(1_000), configs.values(), prices=Prices(context_token=20))
    return worst_of(Trial(engine, configs, {"first": Flood(30, 4, 60), "second": Flood(30, 60, 60)}), 3_000)


def users() -> float:
    trial = pair({"first": Flood(30, 20, 4, num_users=2), "second": LONG}, fairness=Fairness.PER_USER)
    trial.run(4_000)
    return trial.worst_of_users


def no_lift(self: FairShare, left_out: Sequence[str]) -> None:
    """Virtual time stands still: silence banks credit."""


def charged_again(self: Ledger, tenant: Tenant, request: Request, start: int, end: int) -> None:
    """Recomputed tokens cost as much as new ones."""
    num_tokens = end - start
    recomputed = min(num_tokens, max(0, request.num_charged_tokens - start))
    outputs = max(0, num_tokens - recomputed) if request.num_preemptions else 0
    self._charge(tenant, (request,), [recomputed * INPUT_PRICE + outputs * OUTPUT_PRICE])
    CHARGE_PROMPT(self, tenant, request, start, end)


def charged_at_the_end(self: Ledger, tenant: Tenant, requests: Sequence[Request]) -> None:
    """Outputs are charged when a request ends."""


def finished_and_charged(self: Results, request: Request, result: Sampled) -> None:
    TAKE(self, request, result)
    if request.finish_reason is not None:
        tenant = self._request_table.tenants[request.tenant_id]
        self._ledger._charge(tenant, (request,), [OUTPUT_PRICE * request.num_output_tokens])


def never(*_: object) -> None:
    """The rule is dropped."""


CHARGE_PROMPT, TAKE = Ledger.charge_prompt, Results._append


@pytest.mark.parametrize(
    ("scenario", "mutations"),
    [
        pytest.param(returning, [(FairShare, "close_step", no_lift)], id="no lift"),
        pytest.param(recompute, [(Ledger, "charge_prompt", charged_again)], id="recompute charged"),
        pytest.param(
            late_charge,
            [(Ledger, "charge_outputs", charged_at_the_end), (Results, "_append", finished_and_charged)],
            id="charged at the end",
        ),
        pytest.param(
            classes, [(Ledger, "slack", 1 << 60), (Ledger, "open_step", never)], id="a class beyond the slack"
        ),
        pytest.param(
            full_house,
            [(Preemption, "_serve_furthest_behind", never), (Preemption, "pause", never)],
            id="nobody gives way",
        ),
        pytest.param(
            reserved_seats,
            [(Preemption, "_serve_furthest_behind", never), (Preemption, "pause", never)],
            id="nobody gives way, of more seats",
        ),
        pytest.param(scarce_budget, [(Preemption, "pause", never)], id="nobody pauses"),
        pytest.param(
            prompts_beside_turns,
            [(Order, "_streaming_for_an_objective", lambda order: [])],
            id="turns have no limit",
        ),
        pytest.param(contexts, [(Ledger, "_context_cost", lambda *_: 0)], id="context is not charged"),
        pytest.param(users, [(TenantQueue, "charge", never)], id="users are not charged"),
    ],
)
def test_without_the_rule_the_bound_breaks(
    scenario: Callable[[], float], mutations: list[tuple[object, str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scenario() <= 1.0
    for owner, name, mutant in mutations:
        monkeypatch.setattr(owner, name, mutant)
    assert scenario() > 1.0


def test_who_paused_goes_on_when_nobody_is_behind_any_more() -> None:
    trial = scarce_budget_trial()
    num_paused = 0
    while not num_paused:
        trial.run(1)
        tenant = trial.engine.scheduler.request_table.tenants["second"]
        num_paused = len(tenant.decoding) - sum(r.request_id in tenant.decoding for r in trial.engine.owners[-1])
    for request in [r for r in trial.engine.scheduler.request_table.requests.values() if r.tenant_id == "first"]:
        trial.engine.scheduler.abort(request.request_id, FinishReason.ABORT)
    trial.engine.drain(500)


def test_stopping_at_the_first_misfit_wastes_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large head that is first in line and does not fit, beside small prompts that do."""

    def served_beside_it() -> int:
        engine = pair({"first": LONG, "second": LONG}, num_kv_blocks=50).engine
        engine.add("first", 100, 28)
        engine.run(5)
        engine.add("first", 100, 4)
        small = [engine.add("second", 4, 2) for _ in range(3)]
        engine.run(8)
        return sum(request.finish_reason is not None for request in small)

    def stop(capacity: object, request: Request) -> Fit:
        found = fit(capacity, request)  # type: ignore[arg-type]
        stopped.append(found is Fit.STARVED)
        return Fit.STARVED if any(stopped) else found

    assert served_beside_it() == 3
    stopped: list[bool] = []
    fit = KvCapacity.fit
    monkeypatch.setattr(KvCapacity, "fit", stop)
    assert served_beside_it() < 3


@pytest.mark.parametrize("is_ahead", [True, False])
def test_memory_held_for_who_goes_first_is_not_held_against_who_is_furthest_behind(is_ahead: bool) -> None:
    """Found by search. `first`, of a higher class, is ahead of `second` by less than the slack, or came after it, and has
    a prompt without room. What runs is `third`'s alone and pauses once that is too far ahead of `second`, whose prompt
    would fit."""
    configs = [
        TenantConfig(tenant_id="first", weight=10, latency_class=INTERACTIVE),
        TenantConfig(tenant_id="second", weight=10, latency_class=BATCH),
        TenantConfig(tenant_id="third", latency_class=BATCH),
    ]
    engine = PretendEngine(settings_for(33, max_bypasses=0), configs)
    engine.add("third", 40, 80)
    engine.run(3)
    if is_ahead:
        engine.add("first", CHUNK - 1, 1)
        engine.add("first", 100, 4)
        second = engine.add("second", 4, 2)
    else:
        second = engine.add("second", 4, 2)
        engine.add("first", 100, 4)
    engine.run(50)
    assert engine.finish_reason(second) is FinishReason.STOP
    engine.drain(500)
