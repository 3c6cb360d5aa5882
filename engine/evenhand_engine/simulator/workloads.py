"""Named synthetic workloads. Those of the VTC paper (`overload` to `dist_shift`) have its rates, lengths and phases.

Each is a function of a seed alone, so that two runs of a name compare schedulers and nothing else.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.config import LatencyClass, SchedulerConfig, Slo, TenantConfig

Generator = np.random.Generator


@dataclass(frozen=True, slots=True)
class Workload:
    """What a name stands for.

    Attributes:
        make: the requests, in any order.
        tenants: policies that suit it; tenants without one have weight 1 and no objective.
        max_model_len: context that its longest request needs.
    """

    summary: str
    make: Callable[[Generator], Iterator[TraceRequest]]
    tenants: tuple[TenantConfig, ...] = ()
    max_model_len: int = 4_096

    def trace(self, seed: int) -> list[TraceRequest]:
        """The requests, sorted by arrival."""
        return sorted(self.make(np.random.default_rng(seed)), key=lambda request: request.arrival_time)

    def config(self) -> SchedulerConfig:
        """Policies for all tenants of this workload."""
        return equal_shares({request.tenant_id for request in self.make(np.random.default_rng(0))}, self.tenants)


def equal_shares(tenant_ids: set[str], known: tuple[TenantConfig, ...] = ()) -> SchedulerConfig:
    """A config in which every tenant has weight 1, but for those that are `known`."""
    configs = {tenant_id: TenantConfig(tenant_id=tenant_id) for tenant_id in tenant_ids}
    configs |= {tenant.tenant_id: tenant for tenant in known}
    return SchedulerConfig(tenants=tuple(configs[tenant_id] for tenant_id in sorted(configs)))


def _steady(rng: Generator, tenant: str, rate: float, seconds: float, start: float = 0.0) -> Iterator[TraceRequest]:
    """Requests of 256 + 256 tokens at equal distances, from a random phase."""
    phase = rng.uniform(0, 1 / rate)
    for i in range(int(rate * seconds)):
        yield TraceRequest(tenant, start + phase + i / rate, 256, 256)


def _every_other_minute(requests: Iterator[TraceRequest], start: float = 0.0) -> Iterator[TraceRequest]:
    return (request for request in requests if (request.arrival_time - start) // 60 % 2 == 0)


def _poisson(
    rng: Generator, tenant: str, rate: float, seconds: float, lengths: tuple[int, int], start: float = 0.0
) -> Iterator[TraceRequest]:
    """Mean lengths (prompt, output), each drawn from half to one and a half times that."""
    time = start + rng.exponential(1 / rate)
    while time < start + seconds:
        prompt, output = (int(rng.integers(max(1, mean // 2), mean * 3 // 2 + 1)) for mean in lengths)
        yield TraceRequest(tenant, time, prompt, output)
        time += rng.exponential(1 / rate)


def _overload(rng: Generator) -> Iterator[TraceRequest]:
    yield from _steady(rng, "slow", 1.5, 360)
    yield from _steady(rng, "fast", 3.0, 360)


def _proportional(rng: Generator) -> Iterator[TraceRequest]:
    for tenant, rate in (("light", 0.25), ("middle", 0.5), ("heavy", 1.5)):
        yield from _steady(rng, tenant, rate, 600)


def _on_off(rng: Generator) -> Iterator[TraceRequest]:
    yield from _every_other_minute(_steady(rng, "on-off", 0.5, 600))
    yield from _steady(rng, "steady", 2.0, 600)


def _poisson_short_long(rng: Generator) -> Iterator[TraceRequest]:
    for tenant, rate, length in (("short", 8.0, 64), ("long", 1.5, 256)):
        time = rng.exponential(1 / rate)
        while time < 600:
            yield TraceRequest(tenant, time, length, length)
            time += rng.exponential(1 / rate)


def _dist_shift(rng: Generator) -> Iterator[TraceRequest]:
    yield from _every_other_minute(_steady(rng, "first", 0.5, 300))
    yield from _steady(rng, "second", 2.0, 300)
    for start, first, second in ((300.0, 1.0, 1.0), (600.0, 0.5, 1.5)):
        yield from _steady(rng, "first", first, 300, start)
        yield from _steady(rng, "second", second, 300, start)


def _chat_vs_flood(rng: Generator) -> Iterator[TraceRequest]:
    yield from _poisson(rng, "chat", 1.0, 300, (200, 150))
    for _ in range(1_000):
        yield TraceRequest("overnight", 30.0, int(rng.integers(7_000, 9_001)), int(rng.integers(50, 151)))


def _reasoning_prompt(rng: Generator) -> Iterator[TraceRequest]:
    for i in range(20):
        yield TraceRequest(f"stream-{i:02}", 0.05 * i, int(rng.integers(500, 1_501)), 900)
    yield TraceRequest("reasoning", 5.0, 28_000, 200)


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "overload": Workload("two tenants, 1.5 and 3 requests/s, both above their share", _overload),
        "proportional": Workload("three tenants, 0.25, 0.5 and 1.5 requests/s", _proportional),
        "on_off": Workload("one under its share every other minute, one above it", _on_off),
        "poisson_short_long": Workload("8 short requests/s against 1.5 long ones", _poisson_short_long),
        "dist_shift": Workload("three phases of five minutes: on-off, equal, proportional", _dist_shift),
        "chat_vs_flood": Workload(
            "a chatbot beside an overnight job of 1,000 prompts of 8,000 tokens",
            _chat_vs_flood,
            (
                TenantConfig(
                    tenant_id="chat",
                    latency_class=LatencyClass.INTERACTIVE,
                    slo=Slo(time_to_first_token_ms=500, inter_token_latency_ms=100),
                ),
                TenantConfig(tenant_id="overnight", latency_class=LatencyClass.BATCH),
            ),
            max_model_len=16_384,
        ),
        "reasoning_prompt": Workload(
            "one prompt of 28,000 tokens beside 20 streams",
            _reasoning_prompt,
            tuple(
                TenantConfig(
                    tenant_id=f"stream-{i:02}",
                    latency_class=LatencyClass.INTERACTIVE,
                    slo=Slo(inter_token_latency_ms=100),
                )
                for i in range(20)
            ),
            max_model_len=32_768,
        ),
    }
)
