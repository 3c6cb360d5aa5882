"""Masks by seat: preempted requests, drafts, chunks, plans ahead, and after the end."""

from array import array

from evenhand_engine.core.structures import Structures
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import FinishReason, Sampled, SamplingParams
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler

from .conftest import EOS, VOCAB_SIZE
from .masks import allowed, allowed_in, started, token_ids_of


def test_a_grammar_that_becomes_too_complex_leaves_no_token(compiler: Compiler) -> None:
    """So the request ends with an error, and no other does."""
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.regex(r"((\w|\s)*\w(\d|\w|.){30}){1,50}")))
    tokens = tuple(token_ids_of(b"ab cd 12 " * 40))
    for end in range(len(tokens)):
        batch = Batch(1, (ScheduledRequest(0, 1 + end, 1, 1),), 1, (started(0, tokens[:end]),))
        step = structures.begin(batch)
        assert step is not None
        may_come, results = allowed_in(step)[0], [Sampled(())]
        step.advance(results)
        assert results[0].failure is (FinishReason.ERROR if may_come else FinishReason.GRAMMAR)
        if not may_come:
            return
    raise AssertionError("it never became too complex")


def test_a_preempted_request_goes_on_where_it_was(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["abc", "axy"])))
    a, b, c, x, y = token_ids_of(b"abcxy")
    first = Batch(1, (ScheduledRequest(0, 0, 2, 1),), started=(started(0),))
    assert allowed(structures, first, (a,)) == {0: {a}}
    assert allowed(structures, Batch(2, (ScheduledRequest(0, 2, 1, 1),), 1)) == {0: {b, x}}
    again = Batch(3, (ScheduledRequest(5, 0, 4, 1),), started=(started(5, (a, x)),), freed_seats=(0,))
    assert allowed(structures, again, (y,)) == {0: {y}}
    assert allowed(structures, Batch(4, (ScheduledRequest(5, 4, 1, 1),), 1)) == {0: {EOS}}
    assert c not in {y}


def test_rows_of_others_and_chunks_have_no_mask(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab"])))
    (a,) = token_ids_of(b"a")
    free = StartedRequest(1, "free", array("I", (1, 2, 3)), 3, SamplingParams(max_tokens=9))
    chunk = Batch(1, (ScheduledRequest(1, 0, 3, 1), ScheduledRequest(0, 0, 1, 0)), started=(free, started(0)))
    assert allowed(structures, chunk, (7,)) == {}
    both = Batch(2, (ScheduledRequest(1, 3, 1, 1), ScheduledRequest(0, 1, 1, 1)), 1)
    assert allowed(structures, both) == {1: {a}}
    beside_a_chunk = Batch(3, (ScheduledRequest(1, 0, 2, 0), ScheduledRequest(0, 1, 1, 1)), started=(free,))
    assert allowed(structures, beside_a_chunk) == {0: {a}}, "a chunk has no row"
    structures.forget("r")
    taken = Batch(3, (ScheduledRequest(0, 0, 3, 1),), started=(started(0, request_id="other"),))
    assert allowed(structures, taken) == {}


def test_drafts_are_masked_as_if_they_were_right(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["abcd", "axyz"])))
    a, b, c, d, x, y = token_ids_of(b"abcdxy")
    drafted = ScheduledRequest(0, 1, 4, 4, draft_token_ids=(a, x, c))
    batch = Batch(1, (drafted,), 1, (started(0),))
    assert allowed(structures, batch, (a, b)) == {0: {a}, 1: {b, x}, 2: {y}}, "c is no x's follower"
    assert allowed(structures, Batch(2, (ScheduledRequest(0, 3, 1, 1),), 1)) == {0: {c}}
    assert d not in {c}


def test_who_plans_ahead_is_masked_by_what_came_meanwhile(compiler: Compiler) -> None:
    """A step is begun before the last has advanced, whose request may have left its seat to another; or has ended."""
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab"])))
    structures.add("s", compiler.compile("t", grammars.choice(["xy"])))
    a, b, x, y = token_ids_of(b"abxy")
    first = structures.begin(Batch(1, (ScheduledRequest(0, 1, 1, 1),), 1, (started(0),)))
    second = structures.begin(Batch(2, (ScheduledRequest(0, 2, 1, 1),), 1))
    other = structures.begin(Batch(3, (ScheduledRequest(0, 1, 1, 1),), 1, (started(0, request_id="s"),), (0,)))
    assert first is not None and second is not None and other is not None
    first.advance([Sampled((a,))])
    assert allowed_in(second) == {0: {b}}
    assert allowed_in(other) == {0: {x}}
    second.advance([Sampled((b,))])
    other.advance([Sampled((x,))])
    last = structures.begin(Batch(4, (ScheduledRequest(0, 2, 1, 1),), 1))
    beyond = structures.begin(Batch(5, (ScheduledRequest(0, 3, 1, 1),), 1))
    assert last is not None and beyond is not None and allowed_in(last) == {0: {y}}
    last.advance([Sampled((y, EOS))])
    assert allowed_in(beyond) == {}, "its grammar has ended"


def test_after_the_end_all_may_come(compiler: Compiler) -> None:
    """With `ignore_eos` a request goes on."""
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.regex("a+")))
    (a,) = token_ids_of(b"a")
    batch = Batch(1, (ScheduledRequest(0, 1, 1, 1),), 1, (started(0),))
    assert allowed(structures, batch, (a,)) == {0: {a}}
    later = Batch(2, (ScheduledRequest(0, 2, 1, 1),), 1)
    assert allowed(structures, later, (EOS,)) == {0: {a, EOS}}
    assert allowed(structures, Batch(3, (ScheduledRequest(0, 3, 1, 1),), 1)) == {}
