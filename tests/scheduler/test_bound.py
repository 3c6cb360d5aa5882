"""The bound of docs/fairness.md, on random workloads, and mutants of the rules that it must catch.

Held by what came out, not by the accounts: service is counted from the batches and outputs, for every pair of tenants
and over every interval in which both are backlogged, and one level down for the users of a tenant. The bound is a
function of the settings and weights, never of time.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.capacity import Fit, KvCapacity
from evenhand_engine.scheduler.fair_share import FairShare
from evenhand_engine.scheduler.ledger import Ledger
from evenhand_engine.scheduler.order import Order
from evenhand_engine.scheduler.preemption import Preemption
from evenhand_engine.scheduler.request import FinishReason, Request, Sampled
from evenhand_engine.scheduler.results import Results
from evenhand_engine.scheduler.tenant import Tenant
from evenhand_engine.scheduler.tenant_queue import TenantQueue
from evenhand_engine.simulator.device import LinearStepTime
from evenhand_policy.config import (
    Fairness,
    KvCacheShare,
    LatencyClass,
    Limits,
    Prices,
    SchedulerConfig,
    Slo,
    TenantConfig,
)

from .conftest import PretendEngine

INPUT_PRICE, OUTPUT_PRICE = 1, 2
CHUNK, SEATS, LAG = 32, 16, 48
LONGEST = 128  # tokens of a request
LONGEST_PROMPT, LONGEST_OUTPUT = 60, 60
STEP_TIME = LinearStepTime(0.1, per_token=0.01, per_decode_context=1e-3)  # a full step takes a second and more
USERS = ("ann", "bob", "eve")


@dataclass(frozen=True)
class Flood:
    """What one tenant sends: it keeps `num_requests` in the engine, split among `num_users`."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_users: int = 1


class Meter:
    """What everybody received, by the batches alone: each prompt token once, each output token as it is computed."""

    def __init__(self, engine: PretendEngine) -> None:
        self.by_tenant: Counter[str] = Counter()
        self.by_user: Counter[tuple[str, str]] = Counter()
        self._engine = engine
        self._computed: dict[str, int] = {}  # prompt tokens of each request, as far as they were ever computed
        self._num_batches = 0

    def read(self) -> None:
        first = self._num_batches
        engine = self._engine
        for batch, owners, outputs in zip(
            engine.batches[first:], engine.owners[first:], engine.given[first:], strict=True
        ):
            for item, request, num_outputs in zip(batch.scheduled, owners, outputs, strict=True):
                known = self._computed.get(request.request_id, request.num_cached_tokens)
                end = min(item.num_computed_tokens + item.num_scheduled_tokens, request.num_prompt_tokens)
                self._computed[request.request_id] = max(known, end)
                service = max(0, end - known) * INPUT_PRICE + num_outputs * OUTPUT_PRICE
                service += context_cost(engine, known, end)
                sampled_from = item.num_computed_tokens + item.num_scheduled_tokens - item.num_samples
                service += context_cost(engine, max(end, sampled_from), sampled_from + num_outputs)
                self.by_tenant[request.tenant_id] += service
                self.by_user[request.tenant_id, request.user] += service
        self._num_batches = len(self._engine.batches)


def context_cost(engine: PretendEngine, start: int, end: int) -> int:
    """Of tokens at the positions [start, end): each attends to all before it."""
    price = engine.scheduler.config.prices.context_token
    return price * (end * (end - 1) // 2) // 1000 - price * (start * (start - 1) // 2) // 1000 if start < end else 0


class Rise:
    """The most by which a difference has risen above any of its earlier values."""

    def __init__(self) -> None:
        self.most = 0.0
        self.restart()

    def restart(self) -> None:
        self._least = float("inf")

    def take(self, value: float) -> None:
        self._least = min(self._least, value)
        self.most = max(self.most, value - self._least)


def is_backlogged(engine: PretendEngine, batch: Batch | None, config: TenantConfig, *, is_held: bool) -> bool:
    """Whether the step just planned left out work of the tenant that its own limits would have let start.

    Asked before the step's results are known: what ends with it still counts against a limit. A stream that had to
    wait its turn is work left out too; one that pauses since its tenant is too far ahead is not.
    """
    request_table = engine.scheduler.request_table
    tenant = request_table.tenants.get(config.tenant_id)
    if tenant is None:
        return False
    seats = {item.seat for item in batch.scheduled} if batch else set()
    if not is_held and any(not r.is_at_end and r.seat not in seats for r in tenant.decoding.values()):
        return True
    if not len(tenant.waiting):
        return False
    most_running = config.limits.max_concurrent_requests
    if most_running is not None and tenant.num_running >= most_running:
        return False
    if tenant.prefilling or config.kv_cache.max_percent == 100:
        return True
    head = tenant.next_prompt()
    assert head is not None
    most_blocks = engine.settings.num_kv_blocks * config.kv_cache.max_percent // 100
    num_needed = -(-head.num_tokens // engine.settings.block_size)
    return request_table.blocks.num_held_blocks(config.tenant_id) + num_needed <= most_blocks


def settings_for(num_kv_blocks: int = 100, **changes: object) -> SchedulerSettings:
    """Without exemptions: whatever runs may be preempted for who is behind."""
    defaults: dict[str, object] = {
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": SEATS,
        "max_model_len": LONGEST,
        "num_kv_blocks": num_kv_blocks,
        "block_size": 4,
        "preemption_lag": LAG,
        "min_run_seconds": 0.0,
        "max_preemptions": 1 << 20,
        "enable_prefix_caching": False,
    }
    return SchedulerSettings(**(defaults | changes))  # type: ignore[arg-type]


@dataclass
class Trial:
    """A workload on an engine, with what it showed.

    Attributes:
        rises: of each ordered pair of tenants, the difference of weighted services while both were backlogged.
        user_rises: the same of each tenant's users, by (tenant, user, user).
        worst: the largest rise as a share of its bound.
    """

    engine: PretendEngine
    configs: dict[str, TenantConfig]
    floods: dict[str, Flood]
    exempt: float = 0.0
    rises: dict[tuple[str, str], Rise] = field(default_factory=dict)
    user_rises: dict[tuple[str, str, str], Rise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meter = Meter(self.engine)
        self._lightest = min(config.weight for config in self.configs.values())
        self._was_backlogged: set[str] = set()
        self._backlogged: set[str] = set()
        self._worst_before = 0.0  # under earlier weights
        plan, resume = self.engine.scheduler.step, self.engine.scheduler._preemption.resume
        held: set[str] = set()

        def planned(now: float) -> Batch | None:
            held.clear()
            batch = plan(now)
            self._backlogged = {
                name
                for name, config in self.configs.items()
                if is_backlogged(self.engine, batch, config, is_held=name in held)
            }
            return batch

        def resumed() -> None:
            held.update(name for name, tenant in self.engine.scheduler.request_table.tenants.items() if tenant.paused)
            resume()

        self.engine.scheduler.step = planned  # type: ignore[method-assign]
        self.engine.scheduler._preemption.resume = resumed  # type: ignore[method-assign]

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._send()
            self.engine.step()
            self.meter.read()
            self._compare()

    def reconfigure(self, configs: dict[str, TenantConfig]) -> None:
        """Another config: what was received is counted anew under its weights, the bound is that of the lightest.

        What was seen before is judged by the weights that it was seen under.
        """
        self._worst_before = self.worst
        self.configs = configs
        self.engine.scheduler.reconfigure(
            SchedulerConfig(tenants=tuple(configs.values()), prices=self.engine.scheduler.config.prices)
        )
        self._lightest = min(self._lightest, *(config.weight for config in configs.values()))
        self.rises.clear()
        for rise in self.user_rises.values():
            rise.restart()

    def bound(self, *weights: int) -> float:
        """Most by which the weighted service of one of two backlogged tenants may run ahead; docs/fairness.md."""
        slack = CHUNK * OUTPUT_PRICE + self.step_context
        lead = slack + (LONGEST * INPUT_PRICE + self.longest_context + LAG) / self._lightest
        seats, num_drafts = self.engine.settings.max_num_seqs, self.engine.settings.num_speculative_tokens
        num_outputs = max(seats, min(CHUNK, seats * (1 + num_drafts)))
        step = CHUNK * INPUT_PRICE + num_outputs * OUTPUT_PRICE + self.step_context
        return sum(lead + (step + self.exempt) / weight for weight in weights)

    @property
    def longest_context(self) -> float:
        """What the longest request owes for its context."""
        return context_cost(self.engine, 0, LONGEST)

    @property
    def step_context(self) -> float:
        """The same of one step: each token attends to less than the longest request, and is rounded by a request."""
        price = self.engine.scheduler.config.prices.context_token
        return price * CHUNK * LONGEST / 1000 + self.engine.settings.max_num_seqs * (price > 0)

    @property
    def user_bound(self) -> float:
        """The same for two users of one tenant: nothing of a user is preempted for another one."""
        num_outputs = SEATS if not self.engine.settings.num_speculative_tokens else CHUNK
        step = CHUNK * INPUT_PRICE + num_outputs * OUTPUT_PRICE + self.step_context
        return 2.0 * (step + SEATS * (LONGEST * OUTPUT_PRICE + self.longest_context))

    @property
    def worst(self) -> float:
        now = (
            rise.most / self.bound(self.configs[first].weight, self.configs[second].weight)
            for (first, second), rise in self.rises.items()
        )
        return max(self._worst_before, *now, 0.0)

    @property
    def worst_of_users(self) -> float:
        return max((rise.most / self.user_bound for rise in self.user_rises.values()), default=0.0)

    def _send(self) -> None:
        live = Counter((r.tenant_id, r.user) for r in self.engine.scheduler.request_table.requests.values())
        for name, flood in self.floods.items():
            if self.configs[name].suspended:
                continue
            users = USERS[: flood.num_users]
            for user in users:
                for _ in range(-(-flood.num_requests // len(users)) - live[name, user]):
                    self.engine.add(name, flood.num_prompt_tokens, flood.num_output_tokens, user=user)

    def _compare(self) -> None:
        backlogged = self._backlogged
        for pair in permutations(self.configs, 2):
            rise = self.rises.setdefault(pair, Rise())
            if not self._was_backlogged.issuperset(pair):
                rise.restart()
            if backlogged.issuperset(pair):
                first, second = (self.meter.by_tenant[name] / self.configs[name].weight for name in pair)
                rise.take(first - second)
        self._was_backlogged = backlogged
        for name, flood in self.floods.items():
            if self.configs[name].fairness is Fairness.PER_USER and name in backlogged:
                waiting = {request.user for request in self.engine.scheduler.request_table.tenants[name].waiting}
                for one, other in permutations(USERS[: flood.num_users], 2):
                    rise = self.user_rises.setdefault((name, one, other), Rise())
                    if {one, other} <= waiting:
                        rise.take(float(self.meter.by_user[name, one] - self.meter.by_user[name, other]))
                    else:
                        rise.restart()


# -- random workloads

floods = st.builds(
    Flood,
    num_requests=st.integers(24, 40),
    num_prompt_tokens=st.integers(1, LONGEST_PROMPT),
    num_output_tokens=st.integers(2, LONGEST_OUTPUT),
    num_users=st.integers(1, 3),
)


@st.composite
def tenant_configs(draw: st.DrawFn, names: Sequence[str], *, guarantees: bool = False) -> dict[str, TenantConfig]:
    configs = {}
    for name in names:
        guaranteed = draw(st.integers(0, 100 // len(names))) if guarantees else 0
        configs[name] = TenantConfig(
            tenant_id=name,
            weight=draw(st.sampled_from((1, 1, 2, 3, 10, 100))),
            latency_class=draw(st.sampled_from(LatencyClass)),
            limits=Limits(max_concurrent_requests=draw(st.none() | st.none() | st.integers(1, 6))),
            kv_cache=KvCacheShare(
                guaranteed_percent=guaranteed, max_percent=draw(st.just(100) | st.integers(max(60, guaranteed), 100))
            ),
            fairness=draw(st.sampled_from(Fairness)),
            suspended=draw(st.sampled_from((False, False, False, False, True))),
            slo=Slo(inter_token_latency_ms=draw(st.none() | st.none() | st.integers(200, 800))),
        )
    return configs


@st.composite
def trials(draw: st.DrawFn, *, exemptions: bool = False) -> Trial:
    names = [f"tenant{index}" for index in range(draw(st.integers(2, 6)))]
    changes: dict[str, object] = {"max_preemptions": draw(st.integers(0, 3)), "min_run_seconds": 5.0}
    made = settings_for(
        draw(st.integers(60, 300)),
        growth_blocks=draw(st.sampled_from((0.0, 1.5))),
        enable_prefix_caching=draw(st.booleans()),
        num_speculative_tokens=draw(st.sampled_from((0, 0, 2, 8))),
        **(changes if exemptions else {}),
    )
    configs = draw(tenant_configs(names, guarantees=exemptions))
    prices = Prices(context_token=draw(st.sampled_from((0, 0, 20))))
    engine = PretendEngine(made, configs.values(), prices=prices, period=draw(st.sampled_from((0, 3))))
    engine.step_time = STEP_TIME
    trial = Trial(engine, configs, {name: draw(floods) for name in names})
    if exemptions:
        trial.exempt = SEATS * (LONGEST * OUTPUT_PRICE + trial.longest_context)
    return trial


disturbances = st.lists(st.integers(0, 2**16) | st.none(), max_size=8)


def disturb(trial: Trial, disturbance: int | None, data: st.DataObject, *, guarantees: bool) -> None:
    """Cancel every third request from some point on, or change the policies."""
    if disturbance is None:
        trial.reconfigure(data.draw(tenant_configs(tuple(trial.configs), guarantees=guarantees)))
        return
    for request in list(trial.engine.scheduler.request_table.requests.values())[disturbance % 7 :: 3]:
        trial.engine.scheduler.abort(request.request_id, FinishReason.ABORT)


def check(trial: Trial, changes: list[int | None], data: st.DataObject, num_steps: int) -> None:
    for change in (*changes, 1):
        trial.run(num_steps // (len(changes) + 1))
        disturb(trial, change, data, guarantees=trial.exempt > 0)
    assert trial.worst <= 1.0
    assert trial.worst_of_users <= 1.0


@pytest.mark.timeout(900)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(trials(), disturbances, st.data())
def test_whatever_comes_the_bound_holds(trial: Trial, changes: list[int | None], data: st.DataObject) -> None:
    check(trial, changes, data, 200)


@pytest.mark.timeout(900)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(trials(exemptions=True), disturbances, st.data())
def test_what_may_not_be_preempted_adds_no_more_than_it_has_left(
    trial: Trial, changes: list[int | None], data: st.DataObject
) -> None:
    check(trial, changes, data, 200)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@settings(max_examples=3_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans().flatmap(lambda exemptions: trials(exemptions=exemptions)), disturbances, st.data())
def test_whatever_comes_the_bound_holds_for_long(trial: Trial, changes: list[int | None], data: st.DataObject) -> None:
    check(trial, changes, data, 600)


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
