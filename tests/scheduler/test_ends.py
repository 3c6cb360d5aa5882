"""Ends that meet tokens on their way: what is given back, and what must not be lost."""

from itertools import repeat

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_policy.config import KvCacheShare, SchedulerConfig, TenantConfig

from .conftest import PretendEngine


def test_a_stop_string_that_is_found_late_gives_back_only_what_could_be_on_its_way() -> None:
    settings = SchedulerSettings(num_kv_blocks=4096)
    engine = PretendEngine(settings, [TenantConfig(tenant_id="a")])
    request = engine.add("a", 10, 4000)
    engine.run(2001)
    assert (request.num_output_tokens, engine.service("a")) == (2001, 10 + 2 * 2001)
    engine.scheduler.abort(request.request_id, FinishReason.STOP, 1)
    assert engine.service("a") == 10 + 2 * (2001 - settings.max_refunded_tokens)


def test_a_stop_string_that_is_found_at_once_gives_back_all_that_is_past_it() -> None:
    engine = PretendEngine(SchedulerSettings(), [TenantConfig(tenant_id="a")])
    request = engine.add("a", 10, 4000)
    engine.run(10)
    engine.scheduler.abort(request.request_id, FinishReason.STOP, 7)
    assert engine.service("a") == 10 + 2 * 7


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("most", [25, 100])
def test_who_cannot_grow_ends_with_all_tokens_that_were_computed(depth: int, most: int) -> None:
    """At its ceiling, or at the end of the cache, with a token still in flight."""
    settings = SchedulerSettings(num_kv_blocks=16 * 100 // most, block_size=4)
    config = TenantConfig(tenant_id="a", kv_cache=KvCacheShare(max_percent=most))
    engine = PretendEngine(settings, [config], depth=depth)
    request = engine.add("a", 40, 500)
    engine.drain()
    assert engine.finish_reason(request) is FinishReason.LENGTH
    assert len(engine.token_ids(request)) == 64 - 40 + 1
    assert engine.service("a") == 40 + 2 * 25


def test_a_replay_of_a_larger_machine_stays_within_the_steps_of_this_one() -> None:
    settings = SchedulerSettings(max_num_batched_tokens=16)
    engine = PretendEngine(settings)
    engine.scheduler = Scheduler(settings, SchedulerConfig(), token_budgets=repeat(256))
    engine.add("a", 100, 2)
    engine.drain()
    assert max(batch.num_tokens for batch in engine.batches) == 16
