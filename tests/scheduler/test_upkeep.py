"""What one tenant can make the scheduler keep in order costs little in any one step."""

import time
from collections.abc import Callable

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.fair_share import FairShare
from evenhand_engine.scheduler.request import FinishReason, Request, SamplingParams, bounded_priority
from evenhand_engine.scheduler.tenant_queue import TenantQueue
from evenhand_policy.config import Fairness, TenantConfig

from .conftest import PretendEngine


def cpu_seconds(work: Callable[[], object]) -> float:
    """What this thread computed meanwhile, however loaded the machine is."""
    before = time.thread_time()
    work()
    return time.thread_time() - before


def queued(position: int, user: str = "", priority: int = 0) -> Request:
    request = Request(f"{position}", "a", [1], SamplingParams(max_tokens=1), 0.0, user=user, priority=priority)
    request.position = position
    return request


@pytest.mark.parametrize("fairness", Fairness)
def test_sixty_thousand_queued_requests_are_aborted_newest_first(fairness: Fairness) -> None:
    engine = PretendEngine(SchedulerSettings(), [TenantConfig(tenant_id="a", fairness=fairness)])
    requests = [engine.add("a", 1, 4, user=f"user{number % 1000}") for number in range(60_000)]

    def abort_all() -> None:
        for request in reversed(requests):
            engine.scheduler.abort(request.request_id, FinishReason.ABORT)

    assert cpu_seconds(abort_all) < 60_000 * 100e-6, "no abort may cost more for those that are queued"
    assert not engine.scheduler.request_table.requests
    engine.scheduler.request_table.check_integrity()


def test_no_step_is_late_for_a_tenant_with_ever_new_users() -> None:
    """Every user is charged once and never comes back, while one who was served nothing keeps the backlog."""
    users = FairShare()
    users.enter("waits")
    slowest = 0.0
    for step in range(600):
        for number in range(100):
            users.charge(f"user{step}-{number}", 1, 1)
        users.charge("waits", 1, 60)  # so that the virtual time advances, and passes those that were served long ago
        slowest = max(slowest, cpu_seconds(lambda: users.close_step(["waits"])))
    assert slowest < 0.02


def test_accounts_that_the_virtual_time_has_passed_are_forgotten() -> None:
    users = FairShare()
    for step in range(200):
        for number in range(100):
            users.charge(f"user{step}-{number}", 1, 1)
        users.charge("waits", 1, 1)
        users.close_step(["waits"])
    assert users.virtual_service("user0-0") == users.virtual_time
    assert len(users._virtual_service) <= 2_000
    assert len(users._by_service) == len(users._virtual_service)


def test_who_is_ahead_of_the_virtual_time_is_remembered() -> None:
    users = FairShare()
    users.charge("ahead", 10_000, 1)
    for step in range(50):
        for number in range(100):
            users.charge(f"user{step}-{number}", 1, 1)
        users.charge("waits", 1, 1)
        users.close_step(["waits"])
    assert users.virtual_service("ahead") - users.virtual_time == pytest.approx(9_950 << 20)


@pytest.mark.parametrize("per_user", [False, True])
def test_a_preempted_request_finds_its_place_again(per_user: bool) -> None:
    queue = TenantQueue(Fairness.PER_USER if per_user else Fairness.FIFO)
    requests = [queued(position) for position in range(10)]
    for position in (4, 5, 7, 9, 6, 0, 2, 1, 8, 3):
        queue.push(requests[position])
    for position in (5, 9, 0):
        queue.remove(requests[position])
    queue.push(requests[5])
    served = []
    while len(queue):
        head = queue.first((), may_start=True)
        assert head is not None
        served.append(head.position)
        queue.remove(head)
    assert served == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fairness", "order"), [(Fairness.PRIORITY, [3, 5, 1, 4, 0, 2]), (Fairness.FIFO, [0, 1, 2, 3, 4, 5])]
)
def test_priorities_order_requests_where_the_policy_says_so(fairness: Fairness, order: list[int]) -> None:
    queue = TenantQueue(fairness)
    requests = [queued(position, priority=priority) for position, priority in enumerate((7, 0, 7, -2, 0, -2))]
    for request in requests:
        queue.push(request)
    queue.remove(requests[3])
    queue.push(requests[3])  # as a preempted one
    served = []
    while len(queue):
        head = queue.first((), may_start=True)
        assert head is not None
        served.append(head.position)
        queue.remove(head)
    assert served == order


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (-7, -7),
        (0.9, 0),
        (1e30, 100),
        (-(10**30), -100),
        (float("nan"), 0),
        (True, 0),
        ("5", 0),
        (None, 0),
        ([], 0),
    ],
)
def test_a_priority_is_a_number_within_bounds_or_none(value: object, expected: int) -> None:
    assert bounded_priority(value) == expected


def test_the_queues_of_a_deleted_tenant_and_its_heir_are_merged_by_arrival() -> None:
    queue, heir = TenantQueue(Fairness.PER_USER), TenantQueue(Fairness.FIFO)
    for position in range(20_000):
        (queue if position % 2 else heir).push(queued(position, user=f"user{position % 7}"))
    assert cpu_seconds(lambda: heir.extend(queue)) < 2.0
    assert [request.position for request in heir] == list(range(20_000))
