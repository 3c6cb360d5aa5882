"""The named workloads are what they say, and the same each time."""

from collections import Counter

import pytest

from evenhand_engine.simulator.workloads import WORKLOADS


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_makes_one_trace(name: str) -> None:
    workload = WORKLOADS[name]
    trace = workload.trace(3)
    assert trace == workload.trace(3)
    assert trace != workload.trace(4)
    assert [r.arrival_time for r in trace] == sorted(r.arrival_time for r in trace)
    assert all(r.num_prompt_tokens + r.num_output_tokens <= workload.max_model_len for r in trace)
    assert {tenant.tenant_id for tenant in workload.config().tenants} == {r.tenant_id for r in trace}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("overload", {"slow": 540, "fast": 1_080}),
        ("proportional", {"light": 150, "middle": 300, "heavy": 900}),
        ("on_off", {"on-off": 150, "steady": 1_200}),
        ("dist_shift", {"first": 75 + 300 + 150, "second": 600 + 300 + 450}),
        ("reasoning_prompt", {f"stream-{i:02}": 1 for i in range(20)} | {"reasoning": 1}),
    ],
)
def test_published_rates(name: str, counts: dict[str, int]) -> None:
    made = Counter(request.tenant_id for request in WORKLOADS[name].trace(0))
    assert made == pytest.approx(counts, abs=16)


def test_poisson_rates_and_lengths() -> None:
    made = Counter((r.tenant_id, r.num_prompt_tokens) for r in WORKLOADS["poisson_short_long"].trace(0))
    assert made == pytest.approx({("short", 64): 4_800, ("long", 256): 900}, rel=0.1)


def test_on_off_is_silent_every_other_minute() -> None:
    minutes = {int(r.arrival_time // 60) for r in WORKLOADS["on_off"].trace(1) if r.tenant_id == "on-off"}
    assert minutes == {0, 2, 4, 6, 8}
