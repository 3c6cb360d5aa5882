"""Admission: rates, queues and sizes, and the truth of `Retry-After`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost, Reservation
from evenhand_engine.frontend.quota import TokenBucket
from evenhand_policy.config import Enforcement

from .admitting import CONTEXT, admission, refusal, reserve


def test_no_limits_no_refusals() -> None:
    door = admission()
    for _ in range(1000):
        reserve(door)


def test_requests_per_minute() -> None:
    door = admission(requests_per_minute=60)
    reserve(door, count=60)
    refused = refusal(door)
    assert (refused.status, refused.code, refused.retry_after) == (429, "requests_per_minute", pytest.approx(1.0))
    assert refused.retry_after is not None
    reserve(door, now=refused.retry_after)
    refusal(door, now=refused.retry_after)


def test_retry_after_is_true_for_tokens() -> None:
    door = admission(tokens_per_minute=600)
    reserve(door, 300, 300)
    refused = refusal(door, 100, 50, now=3.0)
    assert refused.code == "tokens_per_minute"
    assert refused.retry_after == pytest.approx(12.0)
    refusal(door, 100, 50, now=14.9)
    reserve(door, 100, 50, now=15.0)


def test_refund_of_what_was_not_used() -> None:
    door = admission(tokens_per_minute=600)
    (reservation,) = reserve(door, 100, 500)
    refusal(door, 10, 10)
    door.start(reservation)
    door.settle(reservation, 40, now=0.0)
    assert door.account("a").tokens.level(0.0) == 460  # type: ignore[union-attr]


def test_a_request_that_never_started_costs_nothing() -> None:
    door = admission(tokens_per_minute=600, requests_per_minute=5)
    (reservation,) = reserve(door, 100, 500)
    door.settle(reservation, 0, now=0.0)
    account = door.account("a")
    assert account.tokens is not None and account.tokens.level(0.0) == 600
    assert account.requests is not None and account.requests.level(0.0) == 5
    assert (account.num_in_flight, account.num_not_started) == (0, 0)


def test_all_prompts_of_a_request_or_none() -> None:
    door = admission(tokens_per_minute=100)
    refusal(door, 10, 10, count=6)
    assert door.account("a").tokens.level(0.0) == 100  # type: ignore[union-attr]
    assert len(reserve(door, 10, 10, count=5)) == 5


@given(
    st.integers(1, 50),
    st.integers(1, 2000),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 300), st.integers(1, 300), st.booleans()), max_size=60),
)
def test_never_more_than_burst_and_refill(
    requests: int, tokens: int, arrivals: list[tuple[float, int, int, bool]]
) -> None:
    door = admission(requests_per_minute=requests, tokens_per_minute=tokens)
    now, admitted, used = 0.0, 0, 0
    held: list[Reservation] = []
    for gap, prompt, output, ends in arrivals:
        now += gap
        try:
            held += reserve(door, prompt, output, now)
        except Refusal as refused:
            assert refused.status == (400 if prompt + output > tokens else 429)
        else:
            admitted += 1
            used += prompt + output
        if ends and held:
            reservation = held.pop(0)
            door.start(reservation)
            door.settle(reservation, reservation.cost.max_output_tokens // 2, now)
            used -= reservation.cost.max_output_tokens - reservation.cost.max_output_tokens // 2
        assert admitted <= requests + requests / 60 * now + 1e-6
        assert used <= tokens + tokens / 60 * now + 1e-6
    account = door.account("a")
    assert account.num_in_flight == len(held)


def test_more_than_the_bucket_is_a_400() -> None:
    refused = refusal(admission(tokens_per_minute=100), 60, 50)
    assert (refused.status, refused.code, refused.retry_after) == (400, "tokens_per_minute", None)
    refused = refusal(admission(requests_per_minute=3), count=4)
    assert (refused.status, refused.code) == (400, "requests_per_minute")


def test_what_never_fits_is_said_before_what_must_wait() -> None:
    door = admission(requests_per_minute=1, tokens_per_minute=100)
    reserve(door)
    assert refusal(door, 60, 50).status == 400


def test_the_longest_wait_is_told() -> None:
    door = admission(requests_per_minute=1, tokens_per_minute=60)
    reserve(door, 10, 40)
    assert refusal(door, 10, 40).retry_after == pytest.approx(60.0), "40 s for the tokens"
    door = admission(requests_per_minute=6, tokens_per_minute=60)
    reserve(door, 1, 5, count=6)
    refused = refusal(door, 30, 30)
    assert (refused.code, refused.retry_after) == ("tokens_per_minute", pytest.approx(36.0))


def test_replicas_share_the_rate_and_may_burst_to_one_request() -> None:
    bucket = TokenBucket.resized(None, 6000, 10, 1000, 0.0)
    assert bucket is not None
    assert (bucket.capacity, bucket.rate) == (1000, 10.0)
    bucket = TokenBucket.resized(None, 600, 10, 1000, 0.0)
    assert bucket is not None
    assert (bucket.capacity, bucket.rate) == (600, 1.0), "never beyond the tenant's limit"
    bucket = TokenBucket.resized(None, 60000, 10, 1000, 0.0)
    assert bucket is not None
    assert bucket.capacity == 6000


def test_largest_permitted_request_follows_the_policy() -> None:
    door = admission(num_replicas=100, tokens_per_minute=10000, max_prompt_tokens=200, max_output_tokens=300)
    assert door.account("a").tokens.capacity == 500  # type: ignore[union-attr]
    door = admission(num_replicas=100, tokens_per_minute=10000)
    assert door.account("a").tokens.capacity == CONTEXT  # type: ignore[union-attr]


def test_concurrency_is_rounded_up_over_replicas() -> None:
    door = admission(num_replicas=3, max_concurrent_requests=4, max_queued_requests=1)
    reserve(door, count=3)
    assert refusal(door).code == "queue_full"


def test_queue_holds_what_exceeds_concurrency() -> None:
    door = admission(max_concurrent_requests=2, max_queued_requests=3)
    held = reserve(door, count=5)
    refused = refusal(door)
    assert (refused.status, refused.code) == (429, "queue_full")
    assert refused.retry_after is not None and refused.retry_after >= 1
    door.settle(held[0], 0, now=1.0)
    reserve(door)


def test_queue_without_concurrency_holds_what_has_not_started() -> None:
    door = admission(max_queued_requests=2)
    held = reserve(door, count=2)
    assert refusal(door).code == "queue_full"
    door.start(held[0])
    door.start(held[0])
    reserve(door)
    assert refusal(door).code == "queue_full"


def test_prompts_that_never_fit_the_queue_are_a_400() -> None:
    door = admission(max_concurrent_requests=2, max_queued_requests=3)
    refused = refusal(door, count=6)
    assert (refused.status, refused.code, refused.retry_after) == (400, "queue_full", None)
    reserve(door, count=5)


def test_an_idle_engine_serves_a_tenant_that_may_not_queue() -> None:
    door = admission(max_queued_requests=0)
    (reservation,) = reserve(door)
    door.start(reservation)
    reserve(door)


def test_retry_after_of_a_full_queue_follows_the_drain() -> None:
    door = admission(max_concurrent_requests=1, max_queued_requests=2)
    held = reserve(door, count=3)
    for end in (10.0, 20.0):
        door.settle(held.pop(), 5, now=end)
        held += reserve(door, now=end)
    refused = refusal(door, now=20.0)
    assert refused.retry_after == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("fields", "cost", "code", "param"),
    [
        ({"max_prompt_tokens": 5}, (6, 1), "max_prompt_tokens", "prompt"),
        ({"max_output_tokens": 5}, (1, 6), "max_output_tokens", "max_tokens"),
        ({}, (CONTEXT, 1), "context_length_exceeded", None),
        ({}, (CONTEXT - 10, 11), "context_length_exceeded", "max_tokens"),
    ],
)
def test_sizes(fields: dict[str, object], cost: tuple[int, int], code: str, param: str | None) -> None:
    refused = refusal(admission(**fields), *cost)
    assert (refused.status, refused.code, refused.param, refused.retry_after) == (400, code, param, None)
    reserve(admission(**fields), cost[0] - 1, cost[1] - (code == "max_output_tokens"))


def test_output_limit_of_a_request_that_names_none() -> None:
    assert admission().max_output_tokens("a", 100) == CONTEXT - 100
    assert admission(max_output_tokens=50).max_output_tokens("a", 100) == 50
    assert admission(max_output_tokens=50).max_output_tokens("a", CONTEXT - 20) == 20
    assert admission(tokens_per_minute=300).max_output_tokens("a", 100) == 200
    assert admission(max_output_tokens=50, enforcement=Enforcement.AUDIT).max_output_tokens("a", 100) == CONTEXT - 100


def test_suspended_even_in_audit() -> None:
    door = admission(suspended=True, enforcement=Enforcement.AUDIT)
    refused = refusal(door)
    assert (refused.status, refused.code, refused.retry_after) == (403, "tenant_suspended", None)
    with pytest.raises(Refusal):
        door.check("a", 0.0)


def test_audit_counts_what_it_would_refuse_and_lets_it_pass() -> None:
    door = admission(enforcement=Enforcement.AUDIT, requests_per_minute=2, max_prompt_tokens=50)
    for _ in range(5):
        door.reserve("a", [Cost(10, 10)], 0.0, door.check("a", 0.0))
    over = reserve(door, 60, 1)
    account = door.account("a")
    assert account.audited == {"requests_per_minute": 3, "max_prompt_tokens": 1}
    assert not account.refusals
    assert account.requests is not None and account.requests.level(0.0) == 0, "what would be refused takes nothing"
    assert account.num_in_flight == 2
    door.start(over[0])
    door.settle(over[0], 1, 0.0)
    assert account.num_in_flight == 2


def test_the_models_context_holds_in_audit_too() -> None:
    door = admission(enforcement=Enforcement.AUDIT)
    assert refusal(door, CONTEXT, 1).code == "context_length_exceeded"
