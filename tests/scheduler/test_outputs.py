"""Tokens of streams as they are taken in: one for each step, and what may happen to one of them."""

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.simulator.device import LinearStepTime
from evenhand_policy.config import TenantConfig

from .conftest import PretendEngine


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
def test_of_a_request_that_has_ended_a_token_in_flight_is_not_taken_in(reason: FinishReason) -> None:
    engine = PretendEngine(SchedulerSettings(), depth=2)
    ended, other = engine.add("a", 10, 100), engine.add("a", 10, 100)
    engine.run(8)
    assert ended.num_in_flight_tokens == 1
    token_ids, num_told = list(ended.token_ids), len(engine.token_ids(other))
    engine.scheduler.abort(ended.request_id, reason)
    engine.run(3)
    assert list(ended.token_ids) == token_ids
    assert engine.token_ids(ended) == token_ids[10:]
    assert len(engine.token_ids(other)) == num_told + 3


def test_blocks_that_a_streams_tokens_fill_are_found_by_who_asks_for_the_same() -> None:
    engine = PretendEngine(SchedulerSettings(block_size=4), [TenantConfig(tenant_id="a")])
    request = engine.add("a", 6, 20)
    engine.drain()
    blocks = engine.scheduler.request_table.blocks
    longer = engine.add("a", 0, 2, prompt=[*request.token_ids, 7])
    assert len(request.token_ids) == 26
    assert len(blocks.cached_prefix(longer)) == 25 // 4  # of its last token there are no keys and values


def test_a_guess_that_was_not_drafted_tells_how_well_one_guesses_all_the_same() -> None:
    engine = PretendEngine(SchedulerSettings(num_speculative_tokens=4), period=4)
    engine.step_time = LinearStepTime(0.001, per_token=0.1)  # a draft costs as much as a step
    for _ in range(3):
        engine.add("a", 3, 120)
    request = engine.add("a", 3, 120)
    engine.run(60)
    num_drafts, before = engine.scheduler.speculation.num_drafts, request.acceptance
    engine.run(3)
    assert engine.scheduler.speculation.num_drafts == num_drafts
    assert request.acceptance != before
    assert request.guess == ()
