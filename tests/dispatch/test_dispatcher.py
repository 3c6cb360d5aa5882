"""The dispatcher by itself: order, charges and limits are the engine's own."""

import itertools
from collections import Counter

import pytest

from evenhand_engine.dispatch.dispatcher import Dispatcher, Errand
from evenhand_engine.dispatch.window import Window
from evenhand_engine.scheduler.request import FinishReason
from evenhand_policy.config import Fairness, LatencyClass, Limits, SchedulerConfig, TenantConfig

_ids = itertools.count()


def errand(
    tenant_id: str = "a",
    prompt: int = 100,
    output: int = 50,
    now: float = 0.0,
    user: str = "",
    priority: int = 0,
    num_choices: int = 1,
) -> Errand:
    return Errand(
        f"{next(_ids)}",
        tenant_id,
        now,
        num_prompt_tokens=prompt,
        max_output_tokens=output,
        user=user,
        priority=priority,
        num_choices=num_choices,
    )


def narrow(*tenants: TenantConfig) -> Dispatcher:
    """One that has only room for two at a time."""
    return Dispatcher(Window(batch_tokens=150), SchedulerConfig(tenants=tenants))


def serve(dispatcher: Dispatcher, num_requests: int, now: float = 0.0) -> list[Errand]:
    """The order in which so many are sent, if each starts and ends before the next."""
    order: list[Errand] = []
    while len(order) < num_requests:
        sent = list(dispatcher.dispatch(now))
        assert sent, "idle although something waits"
        order += sent
        for one in sent:
            dispatcher.started(one, now)
            dispatcher.generated(one, one.max_output_tokens)
            dispatcher.end(one)
    return order


def test_what_one_with_many_in_flight_must_leave_is_for_one_with_few_unless_that_is_far_ahead() -> None:
    dispatcher = Dispatcher(
        Window(), SchedulerConfig(tenants=(TenantConfig(tenant_id="a"), TenantConfig(tenant_id="b")))
    )
    dispatcher.window.num_seats = 64
    for tenant_id in ("a",) * 70 + ("b",):
        dispatcher.add(errand(tenant_id, prompt=10), 0.0)
    sent = list(dispatcher.dispatch(0.0))
    assert Counter(one.tenant_id for one in sent) == {"a": 61, "b": 1}
    dispatcher.add(errand("b", prompt=10), 1.0)
    assert [one.tenant_id for one in dispatcher.dispatch(1.0)] == ["b"], "the seat that was left"
    dispatcher.end(next(one for one in sent if one.tenant_id == "b"))
    dispatcher.ledger.shares.charge("b", 1_000_000, 1)
    dispatcher.add(errand("b", prompt=10), 2.0)
    assert list(dispatcher.dispatch(2.0)) == []


def test_charges_are_what_came() -> None:
    dispatcher = narrow()
    one = errand(prompt=100, output=1_000)
    dispatcher.add(one, 0.0)
    assert list(dispatcher.dispatch(0.0)) == [one]
    tenant = dispatcher.request_table.tenants["default"]
    assert tenant.service == 100
    dispatcher.started(one, 0.1)
    dispatcher.generated(one, 7)
    assert tenant.service == 114
    dispatcher.sized(one, 80, num_cached_tokens=30)
    dispatcher.counted(one, 9)
    assert tenant.service == 50 + 18
    dispatcher.end(one)
    dispatcher.end(one)
    dispatcher.generated(one, 5)  # late news of what has ended
    assert tenant.service == 68 and dispatcher.window.num_tokens == 0
    assert (tenant.num_prompt_tokens, tenant.num_generation_tokens) == (50, 9)


def test_users_inside_a_tenant_take_turns() -> None:
    dispatcher = narrow(TenantConfig(tenant_id="a", fairness=Fairness.PER_USER))
    for user in ("first", "first", "first", "first", "second", "second"):
        dispatcher.add(errand(user=user), 0.0)
    assert Counter(one.user for one in serve(dispatcher, 6)[:4]) == {"first": 2, "second": 2}


def test_priorities_order_a_tenants_own_requests_and_nobody_elses() -> None:
    dispatcher = narrow(TenantConfig(tenant_id="a", fairness=Fairness.PRIORITY), TenantConfig(tenant_id="b"))
    for tenant_id, priority in (("a", 5), ("a", -5), ("a", 0), ("b", 9), ("b", -9)):
        dispatcher.add(errand(tenant_id, priority=priority), 0.0)
    order = serve(dispatcher, 5)
    assert [one.priority for one in order if one.tenant_id == "a"] == [-5, 0, 5]
    assert [one.priority for one in order if one.tenant_id == "b"] == [9, -9]
    assert Counter(one.tenant_id for one in order[:4]) == {"a": 2, "b": 2}


def test_a_higher_class_goes_first_inside_the_slack() -> None:
    dispatcher = narrow(
        TenantConfig(tenant_id="a"), TenantConfig(tenant_id="b", latency_class=LatencyClass.INTERACTIVE)
    )
    for tenant_id in ("a", "a", "a", "b", "b"):
        dispatcher.add(errand(tenant_id), 0.0)
    assert [one.tenant_id for one in serve(dispatcher, 5)] == ["b", "b", "a", "a", "a"]


def test_a_concurrency_limit_holds_its_tenant_back_and_nobody_else() -> None:
    dispatcher = Dispatcher(
        Window(),
        SchedulerConfig(tenants=(TenantConfig(tenant_id="a", limits=Limits(max_concurrent_requests=1)),)),
    )
    for tenant_id in ("a", "a", "other"):
        dispatcher.add(errand(tenant_id), 0.0)
    sent = list(dispatcher.dispatch(0.0))
    assert [one.tenant_id for one in sent] == ["a", "default"]
    dispatcher.end(sent[0])
    assert [one.tenant_id for one in dispatcher.dispatch(1.0)] == ["a"]


def test_whoever_waits_too_long_leaves() -> None:
    dispatcher = narrow(TenantConfig(tenant_id="a", limits=Limits(queue_timeout_ms=2_000)))
    queued = [errand() for _ in range(3)]
    for one in queued:
        dispatcher.add(one, 0.0)
    assert len(list(dispatcher.dispatch(0.0))) == 2
    assert dispatcher.next_event == 2.0
    assert list(dispatcher.dispatch(2.1)) == []
    assert dispatcher.refused() == [(queued[2].request_id, FinishReason.QUEUE_TIMEOUT)]
    assert dispatcher.refused() == []


def test_a_suspended_tenants_queue_ends_and_what_runs_goes_on() -> None:
    dispatcher = narrow(TenantConfig(tenant_id="a"))
    queued = [errand() for _ in range(3)]
    for one in queued:
        dispatcher.add(one, 0.0)
    list(dispatcher.dispatch(0.0))
    dispatcher.reconfigure(SchedulerConfig(tenants=(TenantConfig(tenant_id="a", suspended=True),)))
    assert dispatcher.refused() == [(queued[2].request_id, FinishReason.TENANT_SUSPENDED)]
    assert dispatcher.window.num_in_flight == 2
    dispatcher.add(late := errand(), 1.0)
    assert dispatcher.refused() == [(late.request_id, FinishReason.TENANT_SUSPENDED)]


def test_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    dispatcher = narrow()
    queued = [errand() for _ in range(4)]
    for one in queued:
        dispatcher.add(one, 0.0)
    list(dispatcher.dispatch(0.0))
    for one in queued:
        dispatcher.end(one, FinishReason.ABORT)
    assert list(dispatcher.dispatch(0.0)) == [] and dispatcher.refused() == []
    assert dispatcher.window.num_in_flight == 0
    dispatcher.request_table.check_integrity()


def at_most(limit: int) -> SchedulerConfig:
    return SchedulerConfig(tenants=(TenantConfig(tenant_id="a", limits=Limits(max_concurrent_requests=limit)),))


def test_each_choice_counts_against_the_concurrency_limit() -> None:
    dispatcher = Dispatcher(Window(), at_most(4))
    several = [errand(num_choices=num) for num in (3, 1, 2, 1)]
    for one in several:
        dispatcher.add(one, 0.0)
    assert list(dispatcher.dispatch(0.0)) == several[:2]
    dispatcher.end(several[1])
    assert not list(dispatcher.dispatch(1.0)), "two do not fit, and the one behind them does not pass them"
    dispatcher.end(several[0])
    assert list(dispatcher.dispatch(2.0)) == several[2:]
    for one in several[2:]:
        dispatcher.end(one)
    dispatcher.request_table.check_integrity()


def test_one_with_more_choices_than_a_limit_that_was_lowered_runs_alone() -> None:
    dispatcher = Dispatcher(Window(), at_most(8))
    first, large, last = (errand(num_choices=num) for num in (8, 8, 1))
    for one in (first, large, last):
        dispatcher.add(one, 0.0)
    assert list(dispatcher.dispatch(0.0)) == [first]
    dispatcher.reconfigure(at_most(2))
    dispatcher.end(first)
    assert list(dispatcher.dispatch(1.0)) == [large]
    dispatcher.end(large)
    assert list(dispatcher.dispatch(2.0)) == [last]


def test_the_choices_of_a_tenant_that_was_deleted_are_the_default_tenants() -> None:
    dispatcher = Dispatcher(Window(), at_most(8))
    sent = errand(num_choices=3)
    dispatcher.add(sent, 0.0)
    assert list(dispatcher.dispatch(0.0)) == [sent]
    dispatcher.reconfigure(SchedulerConfig())
    assert dispatcher.request_table.tenants["default"].num_running_choices == 3
    dispatcher.end(sent)
    dispatcher.request_table.check_integrity()


@pytest.mark.parametrize(
    ("seconds", "is_silent", "expected"),
    [
        (0.5, True, 0),  # its prompt takes a second
        (11.0, True, 200),
        (1_000.0, True, 500),  # no more than it may have had
        (11.0, False, 0),  # a stream shows what came
    ],
)
def test_an_answer_as_a_whole_that_nobody_waited_for_is_charged_by_time(
    seconds: float, is_silent: bool, expected: int
) -> None:
    dispatcher = Dispatcher(Window(prefill_rate=100.0), SchedulerConfig())
    one = errand("default", prompt=100, output=500)
    one.is_silent = is_silent
    dispatcher.add(one, 0.0)
    assert list(dispatcher.dispatch(0.0)) == [one]
    dispatcher.left(one, seconds)
    dispatcher.end(one, FinishReason.ABORT)
    assert dispatcher.request_table.tenants["default"].num_generation_tokens == expected
    assert one.num_charged_outputs == expected and dispatcher.window.num_tokens == 0
    dispatcher.request_table.check_integrity()
