"""Reasoning ends when its budget is spent; a grammar holds from its end on."""

from array import array
from itertools import pairwise

import pytest

from evenhand_engine.core.reasoning import Thought
from evenhand_engine.core.structures import Structures
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import Reasoning, Sampled, SamplingParams
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler

from .conftest import EOS, VOCAB_SIZE
from .masks import allowed, allowed_in, token_ids_of

BEGIN, END = 258, 259
PROMPT = (1, 2)


def started(reasoning: Reasoning, *outputs: int, seat: int = 0) -> StartedRequest:
    params = SamplingParams(max_tokens=99, reasoning=reasoning)
    return StartedRequest(seat, "r", array("I", (*PROMPT, *outputs)), len(PROMPT), params)


def first(*guests: StartedRequest) -> Batch:
    return Batch(1, tuple(ScheduledRequest(guest.seat, 0, len(guest.token_ids), 1) for guest in guests), started=guests)


def next_output(number: int, *, drafts: tuple[int, ...] = (), seat: int = 0) -> Batch:
    """The step of the output that follows so many."""
    size = 1 + len(drafts)
    item = ScheduledRequest(seat, len(PROMPT) + number - 1, size, size, draft_token_ids=drafts)
    return Batch(2 + number, (item,), num_decodes=1)


def masks_of(structures: Structures, reasoning: Reasoning, outputs: list[int]) -> list[set[int] | None]:
    """What may come as each of these outputs, one step after the other. None: all."""
    found: list[set[int] | None] = []
    for number, token_id in enumerate(outputs):
        batch = next_output(number) if number else first(started(reasoning))
        found.append(allowed(structures, batch, (token_id,)).get(0))
    return found


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_after_its_budget_only_the_end_may_come(budget: int) -> None:
    reasoning = Reasoning(BEGIN, END, starts_inside=True, budget=budget)
    outputs = [*range(10, 10 + budget), END, 20, BEGIN, 21, 22, 23, 24]
    expected = [None] * budget + [{END}] + [None] * 6
    assert masks_of(Structures(VOCAB_SIZE), reasoning, outputs) == expected, "it thinks once"


def test_it_is_counted_from_its_beginning() -> None:
    reasoning = Reasoning(BEGIN, END, budget=2)
    assert masks_of(Structures(VOCAB_SIZE), reasoning, [10, 11, 12, BEGIN, 13, 14, END, 15]) == [
        *[None] * 6,
        {END},
        None,
    ]


def test_who_ends_before_is_left_alone() -> None:
    reasoning = Reasoning(BEGIN, END, starts_inside=True, budget=3)
    assert masks_of(Structures(VOCAB_SIZE), reasoning, [10, END, *range(20)]) == [None] * 22


def test_a_preempted_request_has_thought_what_it_has() -> None:
    structures, reasoning = Structures(VOCAB_SIZE), Reasoning(BEGIN, END, starts_inside=True, budget=3)
    assert allowed(structures, first(started(reasoning)), (10,)) == {}
    again = started(reasoning, 10, 11, 12, seat=4)
    assert allowed(structures, first(again), (END,)) == {0: {END}}
    assert structures.begin(next_output(4, seat=4)) is None, "nothing is left to follow"


def test_drafts_are_held_to_it_as_if_they_were_right() -> None:
    structures, reasoning = Structures(VOCAB_SIZE), Reasoning(BEGIN, END, starts_inside=True, budget=3)
    allowed(structures, first(started(reasoning)), (10,))
    assert allowed(structures, next_output(1, drafts=(11, 12, 13, 14)), (11,)) == {2: {END}}, "no 13 follows"
    assert allowed(structures, next_output(2, drafts=(12, END, 20)), (12, END, 20)) == {1: {END}}
    assert structures.begin(next_output(5)) is None


def test_a_grammar_holds_from_its_end_on(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab"])))
    a, b = token_ids_of(b"ab")
    inside = Reasoning(BEGIN, END, starts_inside=True, budget=2)
    assert masks_of(structures, inside, [b, b, END, a, b, EOS]) == [None, None, {END}, {a}, {b}, {EOS}]
    free = Reasoning(BEGIN, END, starts_inside=True)
    assert masks_of(structures, free, [b, b, b, END, a]) == [None, None, None, None, {a}]


def test_an_output_may_think_first_or_follow_its_grammar_at_once(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab"])))
    a, b = token_ids_of(b"ab")
    either = Reasoning(BEGIN, END)
    assert masks_of(structures, either, [BEGIN, b, END, a, b]) == [{a, BEGIN}, None, None, {a}, {b}]
    assert masks_of(structures, either, [a, b, EOS]) == [{a, BEGIN}, {b}, {EOS}]
    drafted = Batch(1, next_output(0, drafts=(a,)).scheduled, 1, (started(either),))
    assert allowed(structures, drafted, (a, b)) == {0: {a, BEGIN}, 1: {b}}, "it has begun without"


def test_drafts_lead_from_reasoning_into_the_grammar(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab", "xy"])))
    a, b, x, y = token_ids_of(b"abxy")
    allowed(structures, first(started(Reasoning(BEGIN, END, starts_inside=True, budget=2))), (b,))
    found = allowed(structures, next_output(1, drafts=(b, END, a, y)), (b, END, x))
    assert found == {1: {END}, 2: {a, x}, 3: {b}}, "no y follows an a"
    assert allowed(structures, next_output(4), (y,)) == {0: {y}}


def test_who_plans_ahead_need_not_wait_before_the_budget_is_near() -> None:
    structures, reasoning = Structures(VOCAB_SIZE), Reasoning(BEGIN, END, starts_inside=True, budget=3)
    batches = [first(started(reasoning)), *map(next_output, range(1, 4))]
    steps = [step for batch in batches if (step := structures.begin(batch)) is not None]
    assert [step.is_free for step in steps] == [True, True, True, False], "the fourth output may have to be the end"
    for step, token_id in zip(steps[:3], (10, 11, 12), strict=True):
        step.advance([Sampled((token_id,))])
    assert allowed_in(steps[3]) == {0: {END}}
    drafted = structures.begin(next_output(3, drafts=(END, 20)))
    assert drafted is not None and not drafted.is_free


def test_a_grammar_may_begin_at_any_output(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab"])))
    step = structures.begin(first(started(Reasoning(BEGIN, END, starts_inside=True, budget=90))))
    assert step is not None and not step.is_free


def test_thoughts() -> None:
    places: list[Thought | None] = [Thought.of(Reasoning(BEGIN, END, budget=5))]
    for token_id in (1, BEGIN, BEGIN, 2, END):
        assert places[-1] is not None
        places.append(places[-1].after(token_id))
    assert [place and place.num_tokens for place in places] == [None, None, 0, 1, 2, None] and places[-1] is None
    assert [former is later for former, later in pairwise(places)] == [True, False, False, False, False]
