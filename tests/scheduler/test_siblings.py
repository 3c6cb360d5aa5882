"""Equal prompts that come at once, as several choices of one request do: computed once, not once each."""

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import KvCacheShare, TenantConfig

from .conftest import PretendEngine

PROMPT = list(range(1000, 1103))  # 25 full blocks, and three tokens that everybody computes


def engine(tenants: list[TenantConfig], *, depth: int, budget: int = 1024) -> PretendEngine:
    settings = SchedulerSettings(max_num_batched_tokens=budget, num_kv_blocks=4096, block_size=4)
    return PretendEngine(settings, tenants, depth=depth, check_kv=True)


def num_computed_prompt_tokens(engine: PretendEngine) -> int:
    return sum(item.num_scheduled_tokens for batch in engine.batches for item in batch.scheduled[batch.num_decodes :])


@pytest.mark.parametrize("budget", [16, 1024])
@pytest.mark.parametrize("depth", [1, 2])
def test_siblings_wait_for_the_prompt_that_one_of_them_computes(depth: int, budget: int) -> None:
    siblings = engine([TenantConfig(tenant_id="a")], depth=depth, budget=budget)
    requests = [siblings.add("a", 0, 5, prompt=PROMPT) for _ in range(4)]
    siblings.drain()
    assert num_computed_prompt_tokens(siblings) == 103 + 3 * 3
    assert siblings.service("a") == 103 + 3 * 3 + 2 * 4 * 5
    for request in requests:
        assert siblings.token_ids(request) == [siblings.token(request, index) for index in range(5)]
    siblings.scheduler.request_table.check_integrity()


def test_tenants_of_one_sharing_group_wait_for_each_other() -> None:
    group = KvCacheShare(prefix_sharing_group="g")
    shared = engine([TenantConfig(tenant_id=name, kv_cache=group) for name in "ab"], depth=1)
    for name in "ab":
        shared.add(name, 0, 5, prompt=PROMPT)
    shared.drain()
    assert num_computed_prompt_tokens(shared) == 103 + 3


def test_nobody_waits_for_a_prompt_that_was_aborted() -> None:
    siblings = engine([TenantConfig(tenant_id="a")], depth=1)
    first, second = (siblings.add("a", 0, 5, prompt=PROMPT) for _ in range(2))
    siblings.scheduler.step(0.0)
    siblings.scheduler.abort(first.request_id, FinishReason.ABORT)
    assert siblings.scheduler.step(0.0) is None, "its block is in flight"
    siblings.scheduler.fail(1.0)
    siblings.drain()
    assert siblings.finish_reason(second) is FinishReason.STOP


def test_others_start_meanwhile() -> None:
    siblings = engine([TenantConfig(tenant_id="a"), TenantConfig(tenant_id="b")], depth=1)
    for _ in range(2):
        siblings.add("a", 0, 5, prompt=PROMPT)
    other = siblings.add("b", 50, 5)
    siblings.step()
    assert other.started_at is not None
