"""The published metric gives the published figures; each measure does what it says on cases done by hand."""

from pathlib import Path

import numpy as np
import pytest

from evenhand_engine.simulator.measures import (
    Delivery,
    RequestRecord,
    Windows,
    accumulated_gap,
    cumulative_service,
    jain_index,
    service_difference,
    share_of_entitlement,
    slo_attainment,
    throughput,
)
from evenhand_engine.simulator.traces import load_measured_run

DATA = Path(__file__).parents[2] / "benchmarks" / "data"


def record(tenant: str, arrival: float, first: float | None, finish: float | None, **more: object) -> RequestRecord:
    return RequestRecord(tenant, arrival, 100, 50, first, finish, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheduler", "maximum", "mean", "variance", "tokens_per_second"),
    [("fcfs", 759.97, 433.5, 32_112, 777), ("vtc", 368.4, 251.7, 6_549, 779)],
)
def test_published_runs_give_the_published_figures(
    scheduler: str, maximum: float, mean: float, variance: float, tokens_per_second: float
) -> None:
    records = load_measured_run(DATA / f"vtc_paper_{scheduler}_arena.csv")
    difference = service_difference(records)
    assert difference.maximum == pytest.approx(maximum, abs=0.05)
    assert difference.mean == pytest.approx(mean, abs=0.05)
    assert difference.variance == pytest.approx(variance, abs=0.5)
    assert throughput(records) == pytest.approx(tokens_per_second, abs=0.5)


def test_difference_counts_unmet_demand_only_up_to_the_best_served() -> None:
    windows = Windows(duration=20.0, warmup=0.0, width=10.0, count=2)  # one window: [10, 20]
    records = [
        record("a", 10.0, 10.0, 20.0),  # asked for 200 in the window and got 200
        record("b", 10.0, 15.0, 25.0),  # asked for 200 and got 100
        record("c", 30.0, 31.0, 32.0),  # wants nothing there
    ]
    assert service_difference(records, windows).maximum == pytest.approx(10.0)  # b: min(20 - 10, 20 - 10)


def test_a_tenant_served_beyond_its_demand_counts_no_more_than_its_distance_to_the_best() -> None:
    windows = Windows(duration=20.0, warmup=0.0, width=10.0, count=2)
    records = [record("old", 0.0, 10.0, 20.0), record("new", 12.0, 12.5, 20.0)]
    assert service_difference(records, windows).maximum == pytest.approx(0.0)


def test_requests_refused_are_neither_demand_nor_service() -> None:
    windows = Windows(duration=20.0, warmup=0.0, width=10.0, count=2)
    records = [record("a", 10.0, 10.0, 20.0), record("b", 10.0, None, None)]
    assert service_difference(records, windows).maximum == 0.0
    assert throughput(records) == pytest.approx(150 / 20.0)


def test_demand_includes_both_ends_of_a_window() -> None:
    windows = Windows(duration=20.0, warmup=0.0, width=10.0, count=2)
    best = record("best", 10.0, 10.0, 20.0)
    for arrival, difference in [(20.0, 20.0), (20.1, 0.0), (10.0, 20.0), (9.9, 0.0)]:
        assert service_difference([best, record("late", arrival, 40.0, 50.0)], windows).maximum == pytest.approx(
            difference
        )


def test_true_token_times_see_the_pause_that_spreading_hides() -> None:
    times = np.concatenate([np.linspace(1.0, 2.0, 25), np.linspace(9.0, 10.0, 25)])
    paused = record("a", 0.0, 1.0, 10.0, token_times=times)
    at = np.array([0.5, 5.5, 10.0])
    assert cumulative_service([paused], ["a"], at, Delivery.SPREAD)[0] == pytest.approx([0.0, 100.0, 200.0])
    assert cumulative_service([paused], ["a"], at, Delivery.TOKENS)[0] == pytest.approx([0.0, 150.0, 200.0])


def test_true_token_times_cannot_be_guessed() -> None:
    with pytest.raises(ValueError, match="tenant a has no token times"):
        cumulative_service([record("a", 0.0, 1.0, 2.0)], ["a"], np.array([1.0]), Delivery.TOKENS)


def test_accumulated_gap_is_between_the_most_and_the_least_served_after_the_warm_up() -> None:
    windows = Windows(duration=130.0, warmup=30.0, width=10.0, count=2)  # one span: [30, 80]
    records = [record("a", 0.0, 30.0, 80.0), record("b", 0.0, 80.0, 90.0), record("a", 0.0, 0.0, 20.0)]
    assert accumulated_gap(records, windows) == pytest.approx(200.0)


def test_jain_index() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([0.0, 0.0]) == 1.0
    assert jain_index([]) == 1.0


def test_slo_attainment_counts_what_never_came_as_a_miss() -> None:
    assert slo_attainment([0.1, 0.5, 0.9], 0.5) == pytest.approx(2 / 3)
    assert slo_attainment([0.1, 0.5, 0.9], 0.5, num_missing=1) == pytest.approx(0.5)
    assert slo_attainment([], 0.5) == 1.0


def test_share_of_entitlement_of_a_tenant_that_is_entitled_to_nothing_is_one() -> None:
    assert share_of_entitlement(np.array([5.0, 0.0]), np.array([10.0, 0.0])).tolist() == [0.5, 1.0]
