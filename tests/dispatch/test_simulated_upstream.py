"""The dispatcher before a simulated first-come-first-served engine: shares hold, who is quiet hardly waits, and no token is lost."""

import dataclasses
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

import pytest

from evenhand_engine.config import SchedulerSettings, SchedulingPolicy
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_engine.simulator.device import Device, LinearStepTime
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.sidecar import SidecarFaults, SidecarInFront
from evenhand_engine.simulator.simulation import Run, SimulatedScheduler, Simulation
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.config import SchedulerConfig, TenantConfig

DEVICE = Device("test", 20_000, LinearStepTime(0.02, per_prefill_token=5e-5, per_decode_token=2e-5))
SETTINGS = SchedulerSettings(max_num_batched_tokens=1_024, max_num_seqs=64, num_kv_blocks=1_250, max_model_len=8_192)


def simulate(trace: Sequence[TraceRequest], config: SchedulerConfig, until: float, **faults: float | None) -> Run:
    sidecar = SidecarInFront(SETTINGS, config, SidecarFaults(**faults))  # type: ignore[arg-type]
    return Simulation(sidecar, DEVICE, trace, max_model_len=SETTINGS.max_model_len).run(until)


def served(run: Run, since: float = 0.0) -> Counter[str]:
    """Service by tenant, at the default prices, of tokens that came after `since`."""
    services: Counter[str] = Counter()
    for record in run.records:
        if record.token_times is not None:
            services[record.tenant_id] += 2 * int((record.token_times > since).sum())
            services[record.tenant_id] += record.num_prompt_tokens * int(record.token_times[0] > since)
    return services


def flood(tenant_id: str, num: int, prompt: int = 400, output: int = 60, start: float = 0.0) -> Iterator[TraceRequest]:
    for i in range(num):
        yield TraceRequest(tenant_id, start + i * 1e-3, prompt, output)


@pytest.mark.parametrize("weight", [1, 3])
def test_backlogged_tenants_share_by_weight(weight: int) -> None:
    services = compete(weight)
    assert services["a"] / services["b"] == pytest.approx(weight, rel=0.15)


@pytest.mark.parametrize(
    "faults",
    [
        {"kv_scale": 0.1},
        {"kv_scale": 10.0, "gauge_delay": 6.0},
        {"kv_scale": None},
        {"gauges_freeze_at": 2.0},
        {"prompt_scale": 0.7},
    ],
    ids=lambda faults: "-".join(faults),
)
def test_shares_hold_whatever_the_upstream_says(faults: dict[str, float]) -> None:
    """Less exactly in ten seconds: outputs are charged as they come, so a tenant is ahead by what it has in flight."""
    services = compete(3, **faults)
    assert services["a"] / services["b"] == pytest.approx(3, rel=0.35)  # first come first served: 1.04


def test_shares_hold_roughly_where_all_answers_come_as_a_whole() -> None:
    """Nothing tells when a request starts, and what it will cost is guessed until its end. By its end alone: 1.6."""
    services = compete(3, seconds=30.0, is_silent=True)
    assert services["a"] / services["b"] == pytest.approx(3, rel=0.25)


def compete(weight: int, seconds: float = 10.0, **faults: float) -> Counter[str]:
    """Services of two tenants that are backlogged for so long, with prompts and outputs of other lengths."""
    num = round(50 * seconds)
    trace = [*flood("a", num), *flood("b", num, prompt=100, output=200)]
    config = SchedulerConfig(tenants=(TenantConfig(tenant_id="a", weight=weight), TenantConfig(tenant_id="b")))
    return served(simulate(trace, config, 3.0 + seconds, **faults), since=3.0)


def test_silence_earns_nothing() -> None:
    trace = [*flood("b", 600), *flood("a", 400, start=6.0)]
    config = SchedulerConfig(tenants=(TenantConfig(tenant_id="a"), TenantConfig(tenant_id="b")))
    services = served(simulate(trace, config, 17.0), since=7.0)
    assert services["a"] / services["b"] == pytest.approx(1.0, rel=0.15)


def test_a_quiet_tenant_hardly_waits_beside_a_flood_and_no_token_is_lost() -> None:
    quiet = [TraceRequest("quiet", 1.0 + 0.7 * i, 100, 30) for i in range(25)]
    trace = [*quiet, *flood("flood", 1_000)]
    scenario = Scenario.of_trace(trace, DEVICE).with_settings(max_num_batched_tokens=1_024, max_num_seqs=64)
    waits, tokens = {}, {}
    for policy in ("fcfs", "sidecar"):
        run = scenario.run(policy, until=20.0)
        waits[policy] = sorted(
            (r.first_token_time or 20.0) - r.arrival_time for r in run.records if r.tenant_id == "quiet"
        )
        tokens[policy] = sum(served(run).values())
    assert waits["sidecar"][-2] < waits["fcfs"][-2] / 10
    assert tokens["sidecar"] > 0.97 * tokens["fcfs"]


def test_two_tenants_of_kvwarden() -> None:
    """A flooder at 1.5 times the capacity, a quiet tenant at 3 % of it, 128 outputs each, arrivals of Poisson: nobody is
    refused, and 95 % of quiet requests start as if they were nearly alone, where the seats are known and a step of all
    of them takes 1.06 times that of one. One in a hundred comes when the last seat that was left has just been taken, and
    waits until somebody's request ends."""
    capacity, until = 22.5, 130.0
    waits, tokens = defaultdict[str, list[float]](list), Counter[str]()
    fcfs = dataclasses.replace(SETTINGS, scheduling_policy=SchedulingPolicy.FCFS)
    config = SchedulerConfig(tenants=(TenantConfig(tenant_id="quiet"), TenantConfig(tenant_id="flood")))
    for seed in range(2):
        quiet, crowd = (
            list(poisson(tenant_id, rate * capacity, until, seed))
            for tenant_id, rate in (("quiet", 0.03), ("flood", 1.5))
        )
        sidecar = SidecarInFront(SETTINGS, config)
        sidecar.dispatcher.window.num_seats = SETTINGS.max_num_seqs
        schedulers: dict[str, SimulatedScheduler] = {
            "alone": Scheduler(fcfs, SchedulerConfig()),
            "fcfs": Scheduler(fcfs, SchedulerConfig()),
            "fair": Scheduler(SETTINGS, config),
            "sidecar": sidecar,
        }
        for name, scheduler in schedulers.items():
            trace = quiet if name == "alone" else [*quiet, *crowd]
            run = Simulation(scheduler, DEVICE, trace, max_model_len=SETTINGS.max_model_len).run(until)
            records = [r for r in run.records if r.tenant_id == "quiet" and 10.0 < r.arrival_time < until - 1.0]
            waits[name] += [(record.first_token_time or until) - record.arrival_time for record in records]
            tokens[name] += sum(
                len(r.token_times) for r in run.records if r.tenant_id == "flood" and r.token_times is not None
            )
    percentiles = {name: statistics.quantiles(of_all, n=100) for name, of_all in waits.items()}
    p95, p99 = ({name: of_run[p - 1] for name, of_run in percentiles.items()} for p in (95, 99))
    assert len(waits["alone"]) > 100 and p99["fcfs"] > 10.0
    for name in ("fair", "sidecar"):  # without seats left free: 0.3 and 1 s
        assert p95[name] < 1.2 * p95["alone"]
        assert p99[name] < p99["fcfs"] / 30
        assert tokens[name] > 0.95 * tokens["fcfs"]


def poisson(tenant_id: str, rate: float, until: float, seed: int) -> Iterator[TraceRequest]:
    rng, at = random.Random(f"{tenant_id} {seed}"), 0.0
    while (at := at + rng.expovariate(rate)) < until:
        yield TraceRequest(tenant_id, at, 32, 128)


def test_an_arrival_is_sent_when_it_comes_and_not_when_the_upstreams_step_ends() -> None:
    trace = [TraceRequest("a", 0.0, 1_024 * 4, 4), TraceRequest("b", 0.01, 10, 4)]
    run = simulate(trace, SchedulerConfig(), 10.0)
    first, second = (record.first_token_time for record in run.records)
    assert first == pytest.approx(4 * 0.0712)
    assert second == pytest.approx(4 * 0.0712 + 0.0205 + 2e-5)


def test_an_upstream_that_leaves_part_of_each_step_to_others_serves_a_chat_beside_a_long_prompt() -> None:
    """Since one long prompt at a time is sent, and short ones do not wait for it."""
    chat = [TraceRequest("chat", 1.0 + 0.7 * i, 100, 10) for i in range(25)]
    trace = [*chat, *flood("flood", 100, prompt=6_000, output=10)]
    config = SchedulerConfig(tenants=(TenantConfig(tenant_id="chat"), TenantConfig(tenant_id="flood")))
    waits = {}
    for most in (None, 340):
        run = simulate(trace, config, 20.0, long_prefill_tokens=most)
        records = [record for record in run.records if record.tenant_id == "chat"]
        waits[most] = median((record.first_token_time or 20.0) - record.arrival_time for record in records)
    step = 0.02 + 5e-5 * SETTINGS.max_num_batched_tokens
    assert waits[340] < 2.5 * step and waits[None] > 4.5 * step


def test_beside_a_flood_of_long_prompts_hardly_a_step_is_without_one() -> None:
    """Though each chat's is kept free of them: a prompt of the flood ends in a short step, and the next one has come before that ends."""
    chat = [TraceRequest("chat", 1.0 + 0.7 * i, 100, 10) for i in range(25)]
    trace = [*chat, *flood("flood", 100, prompt=4_200, output=10)]
    config = SchedulerConfig(tenants=(TenantConfig(tenant_id="chat"), TenantConfig(tenant_id="flood")))
    run = simulate(trace, config, 20.0)
    without = [
        at for at, shape in zip(run.steps.starts, run.steps.shapes, strict=True) if shape.num_prefill_tokens == 0
    ]
    assert len(without) < 8  # 24 where it is sent when the first chunk before it comes


def test_a_restart_of_the_upstream_ends_what_it_had_and_no_more() -> None:
    run = simulate([*flood("a", 60), *flood("b", 60)], SchedulerConfig(), 200.0, restart_at=2.0)
    ended = [record for record in run.records if record.finish_time is None]
    assert 0 < len(ended) < 80
    assert run.end_time < 200.0  # everything else was served
