"""Inter-token objectives on the machine of the preset `cpu-135m`: whom they slow down, and by how much."""

from collections.abc import Sequence

import numpy as np
import pytest

from evenhand_engine.simulator.device import DEVICES
from evenhand_engine.simulator.measures import RequestRecord
from evenhand_engine.simulator.scenario import Scenario
from evenhand_engine.simulator.simulation import Run
from evenhand_engine.simulator.traces import TraceRequest
from evenhand_policy.config import LatencyClass, SchedulerConfig, Slo, TenantConfig

CPU = DEVICES["cpu-135m"]


def simulate(trace: Sequence[TraceRequest], tenants: Sequence[TenantConfig], until: float) -> Run:
    config = SchedulerConfig(tenants=tuple(tenants))
    scenario = Scenario.of_trace(trace, CPU, config).with_settings(max_model_len=8192, num_kv_blocks=16_384)
    return scenario.run("fair", until)


def of(run: Run, tenant_id: str) -> list[RequestRecord]:
    return [record for record in run.records if record.tenant_id == tenant_id]


def gaps(run: Run, tenant_id: str) -> np.ndarray:
    """Seconds between two tokens of the tenant's streams."""
    return np.concatenate([np.diff(r.token_times) for r in of(run, tenant_id) if r.token_times is not None])


@pytest.mark.parametrize("newcomer", ["other", "chat"])
def test_an_objective_that_cannot_be_met_does_not_stop_prompts(newcomer: str) -> None:
    """Twenty streams behind 1,000 tokens each take 0.15 s a step, whatever their objective says."""
    chat = TenantConfig(tenant_id="chat", slo=Slo(inter_token_latency_ms=100))
    streams = [TraceRequest("chat", 0.0, 1000, 2000) for _ in range(20)]
    run = simulate([*streams, TraceRequest(newcomer, 150.0, 200, 4)], [chat, TenantConfig(tenant_id="other")], 160.0)
    first_token_time = run.records[-1].first_token_time
    assert first_token_time is not None
    assert first_token_time - 150.0 <= 1.0


class TestChatBesideLongStreams:
    """Chat (weight 4, interactive) with one stream beside 31 streams of 4,000 tokens and more, 0.8 s a step in all."""

    START, END = 910.0, 990.0  # while both do nothing but stream

    def run(self, **slo: int) -> Run:
        chat = TenantConfig(tenant_id="chat", weight=4, latency_class=LatencyClass.INTERACTIVE, slo=Slo(**slo))
        flood = [TraceRequest("flood", 0.0, 4000, 4000) for _ in range(31)]
        return simulate(
            [*flood, TraceRequest("chat", 900.0, 32, 4000)], [chat, TenantConfig(tenant_id="flood")], self.END
        )

    def num_tokens(self, run: Run, tenant_id: str) -> list[int]:
        """Of each of its streams."""
        times = [record.token_times for record in of(run, tenant_id)]
        return [int((t > self.START).sum()) for t in times if t is not None]

    def test_the_chat_gets_its_tokens_and_the_flood_its_share_in_turns(self) -> None:
        bound, unbound = self.run(inter_token_latency_ms=100), self.run()
        assert np.quantile(gaps(unbound, "chat"), 0.5) > 0.7
        assert np.quantile(gaps(bound, "chat"), 0.99) <= 0.2
        (chat,), flood = self.num_tokens(bound, "chat"), self.num_tokens(bound, "flood")
        assert sum(flood) / (chat + sum(flood)) >= 1 / 5
        assert chat + sum(flood) >= 0.85 * sum(self.num_tokens(unbound, "chat") + self.num_tokens(unbound, "flood"))
        assert len(flood) == 31
        assert max(flood) - min(flood) <= 1, "no stream is left behind"
