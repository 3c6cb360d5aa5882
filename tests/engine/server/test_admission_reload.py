"""What admission keeps over a reload, and what it counts without the engine."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost, Reservation
from evenhand_engine.frontend.admission import Admission
from evenhand_engine.frontend.quota import TokenBucket
from evenhand_policy.config import DEFAULT_TENANT_ID, Enforcement, Limits, SchedulerConfig, TenantConfig

from .admitting import CONTEXT, admission, config, open_ended, refusal, reserve


def test_reading_and_tokenizing_are_paid_for_whatever_comes_of_them() -> None:
    door = admission(requests_per_minute=2, tokens_per_minute=100)
    assert door.check("a", 0.0) == 1
    with pytest.raises(Refusal) as caught:
        door.reserve("a", [Cost(10, 10)] * 3, 0.0, num_taken=1)
    assert (caught.value.status, caught.value.code) == (400, "requests_per_minute")
    assert door.check("a", 0.0) == 1
    (reservation,) = door.reserve("a", [Cost(10, 90)], 0.0, num_taken=1)
    with pytest.raises(Refusal) as caught:
        door.check("a", 0.0)
    assert (caught.value.status, caught.value.code) == (429, "requests_per_minute")
    door.settle(reservation, 0, 0.0)
    assert door.check("a", 0.0) == 1, "one that never ran gives back its own"
    assert door.account("a").refusals == {"requests_per_minute": 2}


def test_a_refused_request_is_told_to_wait_for_the_request_that_it_paid_too() -> None:
    door = admission(requests_per_minute=1, tokens_per_minute=6000)
    reserve(admission(), 1, 1)
    door.account("a").tokens.take(6000, 0.0)  # type: ignore[union-attr]
    assert door.check("a", 0.0) == 1
    with pytest.raises(Refusal) as caught:
        door.reserve("a", [Cost(10, 10)], 0.0, num_taken=1)
    assert caught.value.retry_after == pytest.approx(60.0)


def test_audit_takes_no_request_that_it_would_have_refused() -> None:
    door = admission(requests_per_minute=1, enforcement=Enforcement.AUDIT)
    assert [door.check("a", 0.0) for _ in range(2)] == [1, 0]
    door.reserve("a", [Cost(1, 1)], 0.0, num_taken=0)
    assert door.account("a").audited == {"requests_per_minute": 1}


def test_a_request_without_a_limit_reserves_what_its_tenant_usually_needs() -> None:
    door = admission(tokens_per_minute=1000)
    for length in [20] * 95 + [400] * 5:
        (reservation,) = door.reserve("a", [Cost(0, 900)], 0.0)
        door.start(reservation)
        door.settle(reservation, length, 0.0)
        door.account("a").tokens.give_back(length, 0.0)  # type: ignore[union-attr]
    assert door.expected_output_tokens("a") == 20
    open_ended(door)
    assert door.account("a").tokens.level(0.0) == pytest.approx(1000 - 30)  # type: ignore[union-attr]
    open_ended(door)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=200))
def test_what_outgrows_its_reservation_overshoots_by_one_part_at_most(steps: list[tuple[int, int]]) -> None:
    door = admission(tokens_per_minute=600)
    bucket = door.account("a").tokens
    assert bucket is not None
    running: list[Reservation] = []
    for index, num_tokens in steps:
        if index >= len(running):
            try:
                running.append(open_ended(door))
            except Refusal:
                continue
        elif not running[index].account.generated(running[index], num_tokens, 0.0):
            ended = running.pop(index)
            door.settle(ended, ended.num_output_tokens, 0.0)
        assert bucket.level(0.0) >= -door.expected_output_tokens("a") - 40
    used = 600 - bucket.level(0.0)
    for reservation in running:
        door.settle(reservation, reservation.num_output_tokens, 0.0)
    assert 600 - bucket.level(0.0) <= used + 40 * len(running)


def test_retry_after_of_a_cold_flooded_tenant() -> None:
    """Nothing of it has ended yet: its outputs so far tell how fast it drains, and until there are some, its patience."""
    door = admission(max_concurrent_requests=1, max_queued_requests=1)
    first, _ = reserve(door, output=100, count=2)
    assert refusal(door, now=8.0).retry_after == pytest.approx(8.0)
    door.start(first)
    first.account.generated(first, 10, 10.0)
    assert refusal(door, now=10.0).retry_after == pytest.approx(100.0)
    first.account.generated(first, 80, 40.0)
    assert refusal(door, now=45.0).retry_after == pytest.approx(50.0)
    door.settle(first, 90, 45.0)
    reserve(door, now=45.0)
    assert refusal(door, now=46.0).retry_after == pytest.approx(45.0)
    assert refusal(door, now=145.0).retry_after == pytest.approx(100.0), "slower than before"


def test_reload_keeps_how_full_the_buckets_are() -> None:
    door = admission(tokens_per_minute=600)
    reserve(door, 100, 200)
    door.reconfigure(config(tokens_per_minute=60), 0.0)
    assert door.account("a").tokens.level(0.0) == pytest.approx(30)  # type: ignore[union-attr]
    for _ in range(10):  # changing back and forth grants nothing
        door.reconfigure(config(tokens_per_minute=6000), 0.0)
        door.reconfigure(config(tokens_per_minute=60), 0.0)
    assert door.account("a").tokens.level(0.0) == pytest.approx(30)  # type: ignore[union-attr]


def test_reload_counts_requests_in_flight_on() -> None:
    door = admission(max_concurrent_requests=1, max_queued_requests=5)
    held = reserve(door, count=3)
    door.reconfigure(config(max_concurrent_requests=1, max_queued_requests=2), 0.0)
    assert refusal(door).code == "queue_full"
    door.settle(held[0], 0, 0.0)
    reserve(door)


def test_deleted_tenant_ends_in_peace() -> None:
    door = admission(tokens_per_minute=600)
    (reservation,) = reserve(door)
    door.reconfigure(SchedulerConfig(), 0.0)
    door.settle(reservation, 5, 0.0)
    assert door.account("a").config.tenant_id == DEFAULT_TENANT_ID
    assert door.account(DEFAULT_TENANT_ID).num_in_flight == 0


def test_default_tenant_has_limits_if_a_policy_claims_it() -> None:
    tenant = TenantConfig(tenant_id=DEFAULT_TENANT_ID, limits=Limits(requests_per_minute=1))
    door = Admission(SchedulerConfig(tenants=(tenant,)), max_model_len=CONTEXT, now=0.0)
    door.reserve(DEFAULT_TENANT_ID, [Cost(1, 1)], 0.0)
    with pytest.raises(Refusal):
        door.reserve(DEFAULT_TENANT_ID, [Cost(1, 1)], 0.0)


def test_work_without_the_engine_counts_as_a_request() -> None:
    door = admission(requests_per_minute=2)
    door.count_request("a", 0.0)
    door.count_request("a", 0.0)
    with pytest.raises(Refusal):
        door.count_request("a", 0.0)
    assert door.account("a").num_in_flight == 0


@given(st.integers(1, 10**6), st.integers(1, 100), st.integers(1, 10**6), st.floats(0, 1000))
def test_after_waiting_it_can_be_taken(limit: int, replicas: int, largest: int, taken: float) -> None:
    bucket = TokenBucket.resized(None, limit, replicas, largest, 0.0)
    assert bucket is not None
    bucket.take(min(taken, bucket.capacity), 0.0)
    wait = bucket.wait(bucket.capacity, 0.0)
    assert bucket.wait(bucket.capacity, math.ceil(wait) + 1e-6) == 0
    assert bucket.level(10**9) == bucket.capacity
