"""What is told of a prompt, whatever the chunks, and who has the seat."""

from array import array

from evenhand_engine.core.prompt_logprobs import PromptLogprobs
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import SamplingParams, TokenLogprobs

TOKENS = [4, 1, 3, 0, 2, 2, 1]
ASKS = SamplingParams(max_tokens=3, num_prompt_logprobs=1)


def started(seat: int, num_tokens: int = 5, params: SamplingParams = ASKS) -> StartedRequest:
    return StartedRequest(seat, f"r{seat}", array("I", TOKENS[:num_tokens]), 5, params)


def score(seats: PromptLogprobs, batch: Batch) -> tuple[list[int], dict[int, list[int]]]:
    """Rows of the batch that are scored, and what is told of prompts that end: the tokens of their entries."""
    rows: list[int] = []
    ended = {}
    for part in seats.begin(batch):
        rows += part.rows
        told = part.tell(TokenLogprobs(0.0, token_id, tuple(range(part.num_top))) for token_id in part.token_ids)
        if part.number is not None:
            ended[part.number] = [entry.rank for entry in told]
    return rows, ended


def test_chunks_are_joined_and_told_with_the_first_sample() -> None:
    seats = PromptLogprobs()
    plain = started(1, params=SamplingParams(max_tokens=3))
    chunks = (ScheduledRequest(1, 0, 2, 0), ScheduledRequest(0, 0, 3, 0))
    assert score(seats, Batch(1, chunks, started=(started(0), plain))) == ([2, 3, 4], {}), "rows of the one that asks"
    ends = (ScheduledRequest(1, 2, 3, 1), ScheduledRequest(0, 3, 2, 1))
    assert score(seats, Batch(2, ends)) == ([3], {1: [1, 3, 0, 2]}), "the last token of a prompt has no follower in it"
    assert score(seats, Batch(3, (ScheduledRequest(0, 5, 1, 1),))) == ([], {})


def test_a_prompt_that_was_preempted_begins_anew_and_one_with_outputs_has_been_told() -> None:
    seats = PromptLogprobs()
    assert score(seats, Batch(1, (ScheduledRequest(0, 0, 3, 0),), started=(started(0),))) == ([0, 1, 2], {})
    again = Batch(2, (ScheduledRequest(0, 0, 5, 1),), started=(started(0),))
    assert score(seats, again) == ([0, 1, 2, 3], {0: [1, 3, 0, 2]})
    resumed = Batch(3, (ScheduledRequest(0, 0, 6, 1),), started=(started(0, num_tokens=6),))
    assert score(seats, resumed) == ([], {})


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    seats = PromptLogprobs()
    one = StartedRequest(0, "a", array("I", [4]), 1, ASKS)
    assert score(seats, Batch(1, (ScheduledRequest(0, 0, 1, 1),), started=(one,))) == ([], {0: []})


def test_a_last_chunk_of_one_token_tells_what_came_before() -> None:
    seats = PromptLogprobs()
    score(seats, Batch(1, (ScheduledRequest(0, 0, 4, 0),), started=(started(0),)))
    assert score(seats, Batch(2, (ScheduledRequest(0, 4, 1, 1),))) == ([], {0: [1, 3, 0, 2]})


def test_parts_that_are_told_late_belong_to_who_had_the_seat() -> None:
    """As of a device that is steps behind: another request has the seat by then."""
    seats = PromptLogprobs()
    (first,) = seats.begin(Batch(1, (ScheduledRequest(0, 0, 5, 1),), started=(started(0),)))
    (second,) = seats.begin(Batch(2, (ScheduledRequest(0, 0, 5, 1),), started=(started(0),)))
    told = [part.tell([TokenLogprobs(value, 1)] * 4) for part, value in ((first, -1.0), (second, -2.0))]
    assert [[entry.logprob for entry in entries] for entries in told] == [[-1.0] * 4, [-2.0] * 4]
