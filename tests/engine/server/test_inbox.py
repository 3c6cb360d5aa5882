"""What waits for a loop that is late: one wake-up, one output for each request."""

from typing import Any

from evenhand_engine.backends.inbox import Arrival, Inbox
from evenhand_engine.messages import EngineFailed, StepOutputs
from evenhand_engine.scheduler.request import FinishReason, RequestOutput, TokenLogprobs

from .scripted_core import idle_stats


def step(*outputs: RequestOutput, **more: Any) -> StepOutputs:
    return StepOutputs(outputs=outputs, **more)


def output(request_id: str, *token_ids: int, **more: Any) -> RequestOutput:
    return RequestOutput(request_id=request_id, token_ids=token_ids, **more)


def test_only_the_first_message_wakes_and_what_is_taken_is_gone() -> None:
    inbox, message = Inbox(), step(output("a", 1))
    assert inbox.put(message, 1.0)
    assert not inbox.put(step(output("a", 2)), 2.0)
    assert [arrival.now for arrival in inbox.take()] == [1.0, 2.0]
    assert inbox.take() == []
    assert inbox.put(message, 3.0)
    assert inbox.take() == [Arrival(message, 3.0)], "as it came"


def test_late_outputs_of_a_request_become_one() -> None:
    inbox = Inbox()
    inbox.put(step(), 0.0)
    first, second = TokenLogprobs(-1.0, 1), TokenLogprobs(-2.0, 2)
    inbox.put(step(output("a", num_cached_tokens=7)), 1.0)
    told = (TokenLogprobs(-3.0, 3),)
    inbox.put(step(output("a", 1, logprobs=(first,), prompt_logprobs=told), output("b", 9)), 2.0)
    last = output("a", 2, 3, logprobs=(second, second), finish_reason=FinishReason.STOP, num_output_tokens=3)
    inbox.put(step(last), 3.0)
    inbox.put(step(output("a", 4)), 3.0)
    _, (message, now) = inbox.take()
    merged = output(
        "a",
        *(1, 2, 3),
        logprobs=(first, second, second),
        prompt_logprobs=told,
        finish_reason=FinishReason.STOP,
        num_output_tokens=3,
        num_cached_tokens=7,
    )
    assert (message, now) == (step(merged, output("b", 9)), 3.0)


def test_a_loop_that_never_comes_costs_one_record_for_each_request() -> None:
    inbox = Inbox()
    for number in range(1000):
        inbox.put(step(*(output(request_id, number) for request_id in "abc")), 0.0)
    arrivals = inbox.take()
    assert [len(arrival.message.outputs) for arrival in arrivals if isinstance(arrival.message, StepOutputs)] == [3, 3]
    assert arrivals[-1].message.outputs[2].token_ids == tuple(range(1, 1000))  # type: ignore[union-attr]


def test_every_report_of_statistics_comes_through() -> None:
    """Each holds what changed since the one before."""
    inbox = Inbox()
    reports = [idle_stats(name) for name in "abc"]
    for stats in reports:
        inbox.put(step(stats=stats), 0.0)
    assert [arrival.message.stats for arrival in inbox.take()] == reports  # type: ignore[union-attr]


def test_the_end_comes_after_what_was_said_before() -> None:
    inbox = Inbox()
    messages = [step(output("a", 1)), step(output("a", 2)), EngineFailed(message="no more"), step(output("a", 3))]
    assert [inbox.put(message, 0.0) for message in messages] == [True, False, False, False]
    assert [arrival.message for arrival in inbox.take()] == messages
