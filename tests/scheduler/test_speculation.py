"""Drafts: guesses of what follows, the steps that compute them, and what they are charged."""

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.pace import StepBudget
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.scheduler.speculation import look_up
from evenhand_engine.scheduler.step_time import StepShape, StepTimeModel
from evenhand_engine.simulator.device import LinearStepTime
from evenhand_policy.config import KvCacheShare, Prices, TenantConfig

from .conftest import PretendEngine

SETTINGS = SchedulerSettings(
    max_num_seqs=4, max_num_batched_tokens=32, max_model_len=400, num_kv_blocks=200, num_speculative_tokens=4
)
CHEAP_TOKENS = LinearStepTime(0.1, per_token=0.001)
DEAR_TOKENS = LinearStepTime(0.001, per_token=0.1)


def guess(token_ids: list[int], most: int) -> tuple[int, ...]:
    """What `look_up` must find, searched place by place."""
    for start in range(len(token_ids) - 4, -1, -1):
        if token_ids[start : start + 3] == token_ids[-3:]:
            known = list(token_ids)
            for number in range(most):
                known.append(known[start + 3 + number])
            return tuple(known[len(token_ids) :])
    return ()


@given(st.lists(st.integers(0, 3) | st.sampled_from((256, 65_536, 16_777_216)), max_size=60), st.integers(0, 12))
def test_a_guess_is_what_followed_the_last_time(token_ids: list[int], most: int) -> None:
    assert look_up(array("I", token_ids), most) == (guess(token_ids, most) if most else ())


def test_a_guess_is_searched_for_only_so_far_back() -> None:
    far = [7, 8, 9, 10, *range(100, 100 + 8_192), 7, 8, 9]
    assert look_up(array("I", far), 1) == ()
    assert look_up(array("I", far[9:]), 1) == ()
    assert look_up(array("I", [7, 8, 9, 10, *range(100, 8_000), 7, 8, 9]), 1) == (10,)


def engine_for(
    settings: SchedulerSettings, step_time: LinearStepTime = CHEAP_TOKENS, **options: object
) -> PretendEngine:
    engine = PretendEngine(settings, check_kv=True, period=4, **options)  # type: ignore[arg-type]
    engine.step_time = step_time
    return engine


def test_text_that_repeats_takes_fewer_steps_and_comes_out_the_same() -> None:
    outputs, num_steps = [], []
    for num_speculative_tokens in (0, 4):
        engine = engine_for(SchedulerSettings(max_model_len=400, num_speculative_tokens=num_speculative_tokens))
        requests = [engine.add("a", 20, 150), engine.add("b", 30, 100)]
        engine.drain()
        outputs.append([engine.token_ids(request) for request in requests])
        num_steps.append(len(engine.batches))
        assert all(engine.finish_reason(request) is FinishReason.STOP for request in requests)
    assert outputs[0] == outputs[1]
    assert num_steps[1] < 0.6 * num_steps[0]
    speculation = engine.scheduler.speculation
    assert 0 < speculation.num_accepted_tokens < speculation.num_draft_tokens <= 4 * speculation.num_drafts


@pytest.mark.parametrize("context_price", [0, 50])
def test_right_drafts_are_charged_as_outputs_and_wrong_ones_not_at_all(context_price: int) -> None:
    charged = set()
    for num_speculative_tokens in (0, 4):
        settings = SchedulerSettings(max_model_len=400, num_speculative_tokens=num_speculative_tokens)
        engine = engine_for(settings, prices=Prices(context_token=context_price))
        engine.add("a", 20, 150)
        engine.drain()
        charged.add((engine.service("default"), engine.scheduler.request_table.tenant("a").num_generation_tokens))
    assert len(charged) == 1


def test_a_draft_that_costs_as_much_as_a_step_is_not_made() -> None:
    engine = engine_for(SETTINGS, DEAR_TOKENS)
    for _ in range(4):
        engine.add("a", 3, 120)
    engine.drain()
    assert engine.scheduler.speculation.num_draft_tokens < 20  # the first steps have yet to show what a token costs


def test_text_that_never_repeats_has_no_drafts() -> None:
    engine = PretendEngine(SETTINGS)
    engine.step_time = CHEAP_TOKENS
    engine.add("a", 20, 150)
    engine.drain()
    assert engine.scheduler.speculation.num_draft_tokens == 0


def test_guesses_that_turn_out_wrong_are_no_longer_drafted() -> None:
    """Every trigram comes twice, with another token after it: text that looks as if it repeated."""
    engine = engine_for(SETTINGS)
    words = [random.Random(seed).sample(range(1_000), 3) for seed in range(40)]
    prompt = [token for index, word in enumerate(words) for token in (*word, 2_000 + index)]
    outputs = [token for index, word in enumerate(words) for token in (*word, 3_000 + index)]
    engine.token = lambda request, index: outputs[index]  # type: ignore[method-assign]
    engine.add("a", 0, 160, max_tokens=160, prompt=prompt)
    engine.drain()
    half = [len(item.draft_token_ids) for batch in engine.batches for item in batch.scheduled]
    assert sum(half[: len(half) // 2]) > sum(half[len(half) // 2 :])


def test_drafts_take_nothing_from_a_prompt() -> None:
    """As many tokens of prompts as without drafts in every step while one waits."""
    engine = engine_for(SETTINGS)
    engine.add("a", 20, 200)
    engine.run(20)
    long = engine.add("b", 300, 2)
    engine.run(9)
    chunks = [item.num_scheduled_tokens for batch in engine.batches[-9:] for item in batch.scheduled[1:]]
    assert chunks[:9] == [31] * 9
    assert long.num_computed_tokens == 9 * 31


def test_drafts_take_no_block_that_others_need() -> None:
    settings = SchedulerSettings(
        max_num_seqs=2, max_model_len=200, num_kv_blocks=8, block_size=16, growth_blocks=1.5, num_speculative_tokens=8
    )
    engine = engine_for(settings)
    engine.add("a", 3, 100)
    engine.add("b", 3, 100)
    engine.drain()
    assert engine.scheduler.num_preemptions == (without := drained_preemptions(settings))
    assert without == 0 or engine.scheduler.speculation.num_accepted_tokens


def drained_preemptions(settings: SchedulerSettings) -> int:
    engine = PretendEngine(settings, period=0)
    engine.add("a", 3, 100)
    engine.add("b", 3, 100)
    engine.drain()
    return engine.scheduler.num_preemptions


def test_drafts_stay_under_a_ceiling() -> None:
    settings = SchedulerSettings(max_model_len=200, num_kv_blocks=100, block_size=4, num_speculative_tokens=8)
    tenant = TenantConfig(tenant_id="a", kv_cache=KvCacheShare(max_percent=20))
    engine = engine_for(settings, tenants=[tenant])
    request = engine.add("a", 3, 190, max_tokens=190)
    most = 0
    while engine.step() is not None:
        most = max(most, engine.scheduler.request_table.blocks.num_held_blocks("a"))
    assert most == 20
    assert engine.token_ids(request)[:70] == [engine.token(request, index) for index in range(70)]


def test_an_objective_counts_drafts_too() -> None:
    """With 103 ms for a step of 100 ms and 1 ms a token there is room for a stream and two drafts."""
    model = StepTimeModel()
    for count in range(1, 30):
        model.observe(StepShape().with_decodes(count, 0), 0.1 + 0.001 * count)
    budget = StepBudget(32, model, [0.1035], 16)
    budget.spend_decodes(1, 0)
    count = 0
    while budget.is_worth_a_draft(1.0, 0):
        budget.spend_draft(1.0, 0)
        count += 1
    assert count == 2
