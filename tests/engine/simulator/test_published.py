"""The published baselines: their order, their memory rule, and the runs that were measured on a real A10G."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.simulator.device import DEVICES
from evenhand_engine.simulator.measures import Delivery, Windows, accumulated_gap, service_difference, throughput
from evenhand_engine.simulator.published import (
    AdmissionOrder,
    DeficitRoundRobin,
    FirstComeFirstServed,
    LeastCounter,
    PublishedServer,
    RequestsPerMinute,
    oracle,
)
from evenhand_engine.simulator.simulation import Run, Simulation
from evenhand_engine.simulator.traces import TraceRequest, load_trace

A10G = DEVICES["a10g-llama-2-7b"]
ARENA = Path(__file__).parents[3] / "benchmarks" / "data" / "arena_trace.csv"


def run(order: AdmissionOrder, trace: list[TraceRequest], **more: object) -> Run:
    server = PublishedServer(order, A10G.num_kv_tokens)
    return Simulation(server, A10G, trace, max_model_len=4_096, lengths_known=True, **more).run()  # type: ignore[arg-type]


def backlog(tenant: str, count: int, prompt: int = 256, output: int = 256, at: float = 0.0) -> list[TraceRequest]:
    return [TraceRequest(tenant, at, prompt, output) for _ in range(count)]


@pytest.mark.parametrize(
    ("order", "maximum", "mean", "tokens_per_second"),
    [(FirstComeFirstServed, 760, 434, 777), (LeastCounter, 368, 252, 779)],
)
def test_the_measured_runs_are_reproduced(
    order: type[AdmissionOrder], maximum: float, mean: float, tokens_per_second: float
) -> None:
    records = run(order(), load_trace(ARENA)).records
    difference = service_difference(records)
    assert difference.maximum == pytest.approx(maximum, rel=0.15)
    assert difference.mean == pytest.approx(mean, rel=0.15)
    assert throughput(records) == pytest.approx(tokens_per_second, rel=0.02)


@pytest.mark.parametrize(("limit", "served"), [(5, 581), (10, 900), (15, 1_053), (20, 1_158), (30, 1_324)])
def test_a_limit_of_requests_per_minute_refuses_as_many_as_were_refused(limit: int, served: int) -> None:
    door = RequestsPerMinute(limit)
    accepted = sum(door.admits(asked) for asked in load_trace(ARENA))
    assert accepted == pytest.approx(served, abs=1)


def test_refused_requests_have_a_record_without_service() -> None:
    records = run(FirstComeFirstServed(), backlog("a", 3, at=1.0), door=RequestsPerMinute(2)).records
    assert [record.is_served for record in records] == [True, True, False]


def test_first_come_first_served_starts_in_order_of_arrival() -> None:
    trace = [TraceRequest(f"t{i % 3}", i * 0.01, 300, 50 + i % 7) for i in range(100)]
    starts = [record.first_token_time for record in run(FirstComeFirstServed(), trace).records]
    assert starts == sorted(starts, key=lambda time: time or 0.0)


class Watched(PublishedServer):
    """Notes the most KV tokens ever held."""

    most = 0

    def step(self, now: float) -> Batch | None:
        batch = super().step(now)
        self.most = max(self.most, sum(request.num_tokens for request in self._running))
        return batch


def test_memory_is_filled_and_never_overrun() -> None:
    rng = np.random.default_rng(1)
    trace = [TraceRequest(f"t{i % 5}", 0.0, int(rng.integers(1, 900)), int(rng.integers(1, 900))) for i in range(200)]
    server = Watched(LeastCounter(), 10_000)
    Simulation(server, A10G, trace, max_model_len=4_096, lengths_known=True).run()
    assert 9_000 < server.most < 10_000


@pytest.mark.parametrize("order", [LeastCounter, lambda: LeastCounter(lift=False), lambda: DeficitRoundRobin(500)])
def test_two_backlogged_tenants_share_whatever_their_demand(order: type[LeastCounter]) -> None:
    trace = backlog("light", 60) + backlog("heavy", 200)
    simulated = run(order(), trace)
    first = Counter(r.tenant_id for r in sorted(simulated.records, key=lambda r: r.finish_time or 0.0)[:80])
    assert abs(first["light"] - first["heavy"]) <= 20


def test_without_the_lift_silence_buys_a_monopoly() -> None:
    trace = backlog("steady", 400) + backlog("silent", 200, at=60.0)
    shares = []
    for lift in (True, False):
        records = run(LeastCounter(lift=lift), trace).records
        started = [r.tenant_id for r in records if r.first_token_time is not None and 65.0 < r.first_token_time < 110.0]
        shares.append(started.count("silent") / len(started))
    assert 0.4 < shares[0] < 0.6
    assert shares[1] > 0.9


def test_knowing_the_output_lengths_narrows_the_gap() -> None:
    trace = [TraceRequest("slow", i / 1.5, 256, 256) for i in range(270)]
    trace += [TraceRequest("fast", i / 3.0, 256, 256) for i in range(540)]
    windows = Windows(duration=180.0)
    gaps = [accumulated_gap(run(LeastCounter(predict=p), trace).records, windows) for p in (None, oracle)]
    assert gaps[1] < gaps[0] / 3


def test_service_by_token_times_is_complete() -> None:
    records = run(LeastCounter(), backlog("a", 20)).records
    assert all(record.token_times is not None and len(record.token_times) == 256 for record in records)
    assert service_difference(records, Windows(duration=60.0), Delivery.TOKENS).maximum == 0.0  # one tenant
