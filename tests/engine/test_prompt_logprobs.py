"""What is told of a prompt, whatever the chunks, and who has the seat."""

from array import array

import numpy as np
import torch

from evenhand_engine.core.prompt_logprobs import PromptLogprobs
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import SamplingParams, TokenLogprobs

TOKENS = np.array([4, 1, 3, 0, 2, 2, 1], np.int32)
ASKS = SamplingParams(max_tokens=3, num_prompt_logprobs=1)


def started(seat: int, num_tokens: int = 5, params: SamplingParams = ASKS) -> StartedRequest:
    return StartedRequest(seat, f"r{seat}", array("I", range(num_tokens)), 5, params)


def logits(*likely: int) -> torch.Tensor:
    """A row for each of these tokens, which it makes likely."""
    return torch.stack([torch.eye(5)[token] * 9 for token in likely]) if likely else torch.empty(0, 5)


def take(seats: PromptLogprobs, batch: Batch, found: torch.Tensor) -> dict[int, tuple[TokenLogprobs, ...]]:
    return seats.take(batch, found, np.arange(len(found)))


def test_chunks_are_joined_and_told_with_the_first_sample() -> None:
    seats = PromptLogprobs(lambda seat, end: TOKENS[:end])
    plain = started(1, params=SamplingParams(max_tokens=3))
    chunks = (ScheduledRequest(1, 0, 2, 0), ScheduledRequest(0, 0, 3, 0))
    batch = Batch(1, chunks, started=(started(0), plain))
    assert seats.rows(batch) == [2, 3, 4], "the rows of the one that asks"
    assert take(seats, batch, logits(1, 3, 3)) == {}
    batch = Batch(2, (ScheduledRequest(0, 3, 2, 1), ScheduledRequest(1, 2, 3, 1)))
    assert seats.rows(batch) == [0], "the last token of a prompt has no follower in it"
    told = take(seats, batch, logits(2))
    assert list(told) == [0]
    assert [entry.rank for entry in told[0]] == [1, 1, 2, 1], "of the tokens 1, 3, 0, 2"
    assert [entry.top_token_ids for entry in told[0]] == [(1,), (3,), (3,), (2,)]
    decode = Batch(3, (ScheduledRequest(0, 5, 1, 1),))
    assert seats.rows(decode) == [] and take(seats, decode, logits()) == {}


def test_a_prompt_that_was_preempted_begins_anew_and_one_with_outputs_has_been_told() -> None:
    seats = PromptLogprobs(lambda seat, end: TOKENS[:end])
    first = Batch(1, (ScheduledRequest(0, 0, 3, 0),), started=(started(0),))
    assert len(seats.rows(first)) == 3
    take(seats, first, logits(1, 3, 0))
    again = Batch(2, (ScheduledRequest(0, 0, 5, 1),), started=(started(0),))
    assert seats.rows(again) == [0, 1, 2, 3]
    assert len(take(seats, again, logits(1, 3, 0, 2))[0]) == 4
    resumed = Batch(3, (ScheduledRequest(0, 0, 6, 1),), started=(started(0, num_tokens=6),))
    assert seats.rows(resumed) == [] and take(seats, resumed, logits()) == {}


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    seats = PromptLogprobs(lambda seat, end: TOKENS[:end])
    one = StartedRequest(0, "a", array("I", [4]), 1, ASKS)
    batch = Batch(1, (ScheduledRequest(0, 0, 1, 1),), started=(one,))
    assert seats.rows(batch) == [] and take(seats, batch, logits()) == {0: ()}


def test_a_last_chunk_of_one_token_tells_what_came_before() -> None:
    seats = PromptLogprobs(lambda seat, end: TOKENS[:end])
    first = Batch(1, (ScheduledRequest(0, 0, 4, 0),), started=(started(0),))
    seats.rows(first)
    take(seats, first, logits(1, 3, 0, 2))
    last = Batch(2, (ScheduledRequest(0, 4, 1, 1),))
    assert seats.rows(last) == [] and len(take(seats, last, logits())[0]) == 4


def test_rows_of_prompts_are_found_among_those_of_samples() -> None:
    """Kernels take rows in ascending order only."""
    seats = PromptLogprobs(lambda seat, end: TOKENS[:end])
    batch = Batch(1, (ScheduledRequest(0, 0, 5, 1),), started=(started(0),))
    seats.rows(batch)
    told = seats.take(batch, logits(4, 1, 4, 3, 0, 2), np.array([1, 3, 4, 5]))
    assert [entry.rank for entry in told[0]] == [1, 1, 1, 1]
