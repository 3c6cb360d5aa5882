"""Prefix-aware choice: inside the slack, who finds most of its next prompt in the cache goes first."""

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.block_manager import BlockManager
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import TenantConfig

from .conftest import PretendEngine

TENANTS = tuple(f"tenant{index}" for index in range(6))
NUM_SHARED, NUM_OWN, NUM_OUTPUTS = 128, 8, 4
CHUNK, SEATS = 128, 4


class SharedPrefixes:
    """Each tenant has a long prefix of its own before every prompt; the cache holds those of a few of them."""

    def __init__(self) -> None:
        settings = SchedulerSettings(
            max_num_batched_tokens=CHUNK,
            max_num_seqs=SEATS,
            max_model_len=256,
            num_kv_blocks=150,
            block_size=4,
            preemption_lag=64,
            min_run_seconds=0.0,
            max_preemptions=1 << 20,
        )
        self.engine = PretendEngine(settings, [TenantConfig(tenant_id=tenant_id) for tenant_id in TENANTS])
        self.spreads: list[int] = []

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            live = [request.tenant_id for request in self.engine.scheduler.request_table.requests.values()]
            for number, tenant_id in enumerate(TENANTS):
                for _ in range(6 - live.count(tenant_id)):
                    prefix = [10_000 * (number + 1) + index for index in range(NUM_SHARED)]
                    own = [len(self.engine.requests) * 100 + 1_000_000 + index for index in range(NUM_OWN)]
                    self.engine.add(tenant_id, 0, NUM_OUTPUTS, prompt=prefix + own)
            self.engine.step()
            services = [self.engine.service(tenant_id) for tenant_id in TENANTS]
            self.spreads.append(max(services) - min(services))

    @property
    def hit_rate(self) -> float:
        blocks = self.engine.scheduler.request_table.blocks
        return blocks.num_prefix_hits / blocks.num_prefix_queries

    @property
    def bound(self) -> int:
        """How far one may be ahead of another, all being backlogged from the start; docs/fairness.md."""
        return CHUNK * 2 + (256 + 64) + CHUNK + SEATS * 2


def test_more_prefixes_are_found_and_the_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    aware = SharedPrefixes()
    aware.run(1_500)
    monkeypatch.setattr(BlockManager, "num_expected_hits", lambda self, request: 0)
    blind = SharedPrefixes()
    blind.run(1_500)
    assert aware.hit_rate > blind.hit_rate + 0.1
    assert max(aware.spreads) <= aware.bound
    done = [sum(r.finish_reason is not None for r in trial.engine.requests.values()) for trial in (aware, blind)]
    assert done[0] > 1.2 * done[1]


def test_the_expected_prefix_follows_what_is_cached_and_evicted() -> None:
    engine = PretendEngine(SchedulerSettings(num_kv_blocks=20, block_size=4), [TenantConfig(tenant_id="a")])
    blocks, prompt = engine.scheduler.request_table.blocks, list(range(100, 132))
    engine.add("a", 0, 2, prompt=prompt)
    engine.drain()
    longer = engine.add("a", 0, 2, prompt=[*prompt[:20], *range(500, 520)])
    assert blocks.num_expected_hits(longer) == 20 == 4 * len(blocks.cached_prefix(longer))
    engine.scheduler.abort(longer.request_id, FinishReason.ABORT)
    engine.add("a", 70, 2)
    engine.drain()
    assert blocks.num_expected_hits(longer) == 4 * len(blocks.cached_prefix(longer)) < 20
