"""The bound of docs/fairness.md, on random workloads.

Held by what came out, not by the accounts: service is counted from the batches and outputs, for every pair of tenants
and over every interval in which both are backlogged, and one level down for the users of a tenant. The bound is a
function of the settings and weights, never of time.
"""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import (
    Fairness,
    KvCacheShare,
    LatencyClass,
    Limits,
    Prices,
    Slo,
    TenantConfig,
)

from .conftest import PretendEngine
from .trial import LONGEST, LONGEST_OUTPUT, LONGEST_PROMPT, OUTPUT_PRICE, SEATS, STEP_TIME, Flood, Trial, settings_for

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
        target_step_seconds=draw(st.sampled_from((None, None, 0.2, 0.5))),
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


@pytest.mark.timeout(1800)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(trials(), disturbances, st.data())
def test_whatever_comes_the_bound_holds(trial: Trial, changes: list[int | None], data: st.DataObject) -> None:
    check(trial, changes, data, 200)


@pytest.mark.timeout(1800)
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
