"""The fluid ideals, against cases done by hand and against each other."""

import numpy as np
import pytest

from evenhand_engine.simulator.fluid import FluidShare, StreamLimitedFluid, max_min_shares
from evenhand_engine.simulator.measures import Delivery, RequestRecord, Windows


def request(tenant: str, arrival: float, prompt: int, output: int) -> RequestRecord:
    return RequestRecord(tenant, arrival, prompt, output)


def test_two_backlogged_tenants_share_by_weight_and_the_rest_flows_on() -> None:
    records = [request("light", 0.0, 30, 0), request("heavy", 0.0, 300, 0)]
    fluid = FluidShare(records, capacity=10.0, weights={"heavy": 3.0})
    service = fluid.cumulative_service(["light", "heavy"], np.array([4.0, 12.0, 33.0, 100.0]))
    # rates 2.5 and 7.5 until the light one's 30 are served at 12 s; then all 10 go to the heavy one
    assert service[0] == pytest.approx([10.0, 30.0, 30.0, 30.0])
    assert service[1] == pytest.approx([30.0, 90.0, 300.0, 300.0])


def test_an_idle_machine_serves_a_newcomer_at_once_and_banks_nothing() -> None:
    records = [request("a", 0.0, 10, 0), request("a", 50.0, 100, 0), request("b", 50.0, 100, 0)]
    fluid = FluidShare(records, capacity=10.0)
    service = fluid.cumulative_service(["a", "b"], np.array([1.0, 50.0, 60.0, 70.0]))
    assert service[0] == pytest.approx([10.0, 10.0, 60.0, 110.0])
    assert service[1] == pytest.approx([0.0, 0.0, 50.0, 100.0])


def test_nothing_is_lost_or_made_up() -> None:
    rng = np.random.default_rng(3)
    records = [
        request(f"t{rng.integers(7)}", float(rng.uniform(0, 50)), int(rng.integers(1, 90)), int(rng.integers(1, 90)))
        for _ in range(300)
    ]
    tenants = sorted({record.tenant_id for record in records})
    fluid = FluidShare(records, capacity=100.0, weights={"t1": 5.0})
    total = [sum(record.cost for record in records if record.tenant_id == tenant) for tenant in tenants]
    assert fluid.cumulative_service(tenants, np.array([1e6]))[:, 0] == pytest.approx(total)
    middle = fluid.cumulative_service(tenants, np.array([20.0, 40.0])).sum(axis=0)
    assert middle[1] - middle[0] == pytest.approx(2_000.0)  # backlogged throughout


def test_without_a_stream_limit_both_ideals_are_one() -> None:
    rng = np.random.default_rng(5)
    records = [request(f"t{i % 5}", float(rng.uniform(0, 100)), 50, int(rng.integers(10, 300))) for i in range(200)]
    windows = Windows(duration=100.0, warmup=5.0, width=10.0)
    exact = FluidShare(records, 500.0).service_difference(records, windows)
    ticked = StreamLimitedFluid(records, 500.0, step_seconds=1e-6, tick=0.01).service_difference(
        windows, Delivery.TOKENS
    )
    assert ticked.mean == pytest.approx(exact.mean, rel=0.02)
    assert ticked.maximum == pytest.approx(exact.maximum, rel=0.02)


def test_a_single_stream_gets_one_token_a_step_however_large_the_machine() -> None:
    records = [request("a", 0.0, 100, 100), request("b", 200.0, 1, 1)]
    windows = Windows(duration=20.0, warmup=0.0, width=5.0, count=2)  # [10, 15]
    busy = StreamLimitedFluid([*records, request("b", 10.0, 1_000, 1)], 1e6, step_seconds=0.5)
    difference = busy.service_difference(windows, Delivery.TOKENS)
    # b gets its 1,002 at once, 200.4 a second; a runs at 2 tokens a second: 4, and demands nothing new: |0 - 4|
    assert difference.maximum == pytest.approx(4.0, rel=0.05)


def test_the_ideal_run_has_requests_whose_times_are_those_of_its_streams() -> None:
    alone = request("a", 0.0, 100, 50)
    (served,) = StreamLimitedFluid([alone], 1_000.0, step_seconds=0.1).records
    assert served.first_token_time == pytest.approx(0.2)  # 100 of prompt in the first tick, 2 of output in the next
    assert served.finish_time == pytest.approx(5.1)  # 50 tokens, one in each step of 0.1 s


def test_the_published_measure_spreads_a_stream_that_true_times_show_slowed() -> None:
    # a has 20 a second for 5 s, then 10 beside b until 15 s; spread evenly that is 13.3 throughout
    records = [request("a", 0.0, 0, 100), request("b", 5.0, 0, 50)]
    windows = Windows(duration=12.0, warmup=0.0, width=2.0, count=2)  # [6, 8], in which neither demands anything new
    run = StreamLimitedFluid(records, 20.0, step_seconds=0.1)
    assert run.service_difference(windows, Delivery.TOKENS).maximum == pytest.approx(0.0, abs=1e-6)
    assert run.service_difference(windows).maximum == pytest.approx(10 / 3, rel=0.02)


@pytest.mark.parametrize(
    ("demands", "budget", "shares"),
    [([1.0, 5.0, 9.0], 30.0, [1, 5, 9]), ([1.0, 5.0, 9.0], 9.0, [1, 4, 4]), ([9.0, 1.0], 4.0, [3, 1])],
)
def test_max_min_shares(demands: list[float], budget: float, shares: list[float]) -> None:
    assert max_min_shares(np.array(demands), budget).tolist() == pytest.approx(shares)
