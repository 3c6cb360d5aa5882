"""The window: what is counted is what is in flight, the upstream is never idle, and its batch is learned from the wire."""

import random

import pytest

from evenhand_engine.dispatch.flight import Flight, Room
from evenhand_engine.dispatch.gauges import Gauges
from evenhand_engine.dispatch.window import Window


def fill(window: Window, num_prompt_tokens: int, now: float) -> list[Flight]:
    """Send equal prompts until there is no room."""
    flights = []
    while window.room(num_prompt_tokens, 10, now) is Room.FREE:
        flights.append(window.send(num_prompt_tokens, 10, now))
    return flights


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_what_is_in_flight(seed: int) -> None:
    rng = random.Random(seed)
    window, flights, now = Window(batch_tokens=500, kv_tokens=5_000), [], 0.0
    for _ in range(500):
        now += rng.expovariate(20)
        match rng.randrange(6):
            case 0 | 1:
                prompt, expected = rng.randint(1, 900), rng.randint(0, 300)
                if window.room(prompt, expected, now) is Room.FREE:
                    flights.append(window.send(prompt, expected, now, is_silent=rng.random() < 0.3))
            case 2 if flights:
                window.start(rng.choice(flights), now)
            case 3 if flights:
                window.grow(rng.choice(flights), rng.randint(1, 200))
            case 4 if flights:
                window.end(flights.pop(rng.randrange(len(flights))))
            case 5:
                window.advance(now)
                if flights:
                    window.resize_prompt(rng.choice(flights), rng.randint(1, 900))
        assert window.num_in_flight == len(flights)
        assert window.num_tokens == sum(flight.num_tokens for flight in flights)
        assert 0 <= window.num_unstarted <= len(flights)
        assert window.num_unstarted_tokens <= sum(flight.num_prompt_tokens for flight in flights)
    for flight in flights:
        window.end(flight)
    assert (window.num_tokens, window.num_unstarted, window.num_unstarted_tokens) == (0, 0, 0)


def test_an_idle_upstream_gets_whatever_waits() -> None:
    window = Window(batch_tokens=16, kv_tokens=100)
    assert window.room(10_000, 10_000, 0.0) is Room.FREE
    window.send(10_000, 10_000, 0.0)
    assert window.room(1, 1, 0.0) is Room.NONE  # the cache is full


def test_one_short_prompt_computes_while_one_waits_however_small_the_batch_is() -> None:
    assert len(fill(Window(batch_tokens=100), 90, 0.0)) == 2


def test_a_long_prompt_goes_when_a_twelfth_of_it_is_left_of_the_one_before() -> None:
    window = Window(batch_tokens=500, prefill_rate=1_000.0)
    (first,) = fill(window, 4_000, 0.0)
    assert window.room(4_000, 10, 2.0) is Room.NONE and window.next_due == pytest.approx(4 - 4 / 12)
    assert window.room(400, 10, 2.0) is Room.FREE, "a short one is not held back by a long one"
    (second,) = fill(window, 4_000, 3.7)
    assert window.room(4_000, 10, 60.0) is Room.NONE and window.next_due == float("inf"), "done only with a first chunk"
    window.start(first, 60.0)
    assert window.room(4_000, 10, 60.0) is Room.NONE
    assert window.num_left_tokens(60.0) == 4_000
    window.end(second)
    short = window.send(20, 10, 60.0)
    assert window.room(4_000, 10, 60.0) is Room.NONE, "a short one would share a full step with it"
    window.start(short, 60.1)
    assert window.room(4_000, 10, 60.1) is Room.FREE


def test_a_long_prompt_misses_the_step_that_a_short_one_waits_for_and_not_the_next() -> None:
    window = Window(batch_tokens=100, prefill_rate=1_000.0)
    first = window.send(1_000, 1, 0.0)
    window.send(50, 1, 0.2)
    assert window.room(1_000, 1, 0.96) is Room.NONE, "a twelfth is not enough: it would share the short one's step"
    assert window.next_due == pytest.approx(1.1)
    assert window.room(1_000, 1, 1.1) is Room.FREE, "the step that ends the first has taken in the short one"
    window.start(first, 1.11)
    assert window.room(1_000, 1, 1.12) is Room.NONE, "the short one is the first now"
    assert window.room(1_000, 1, 1.2) is Room.FREE
    window.send(1_000, 1, 1.2)
    window.send(50, 1, 1.2)
    assert window.room(1_000, 1, 9.0) is Room.NONE, "a long one behind the first: its chunk is awaited"


def test_a_long_prompt_goes_when_the_step_that_takes_in_a_short_one_has_begun() -> None:
    """Which the events of other streams tell: so it shares the next step, and none is without a prompt."""
    window = Window(batch_tokens=100, prefill_rate=1_000.0)
    window.send(1_000, 1, 0.0)  # four steps of 240 tokens, and one of 40
    window.send(50, 1, 0.2)
    for now in (0.24, 0.48, 0.72):
        assert window.room(1_000, 1, now - 0.01) is Room.NONE
        assert not window.hear(now) and not window.hear(now + 0.001)
    assert window.room(1_000, 1, 0.95) is Room.NONE
    assert window.hear(0.96) and not window.hear(0.961), "one event tells"
    assert window.room(1_000, 1, 0.97) is Room.FREE
    window.send(1_000, 1, 0.97)
    assert not window.hear(1.1), "nobody waits for it"


def test_the_rate_is_learned_from_what_was_left_and_how_long_it_took() -> None:
    """Long prompts one after another at 200 tokens a second, chats in between that say little of the rate."""
    window, now, leads = Window(batch_tokens=64, prefill_rate=8_000.0), 0.0, []
    flights = fill(window, 2_000, now)
    for _ in range(20):
        done = now + 10.0
        while len(flights) < 2 and (sent_at := window.next_due) < done:
            flights += fill(window, 2_000, sent_at)
            leads.append(done - sent_at)
        window.start(flights.pop(0), done)
        window.start(window.send(20, 10, done), done + 0.1)
        flights += fill(window, 2_000, done + 0.1)
        now = done
    assert window.prefill_rate == pytest.approx(200, rel=0.05)
    assert leads[-1] == pytest.approx(10 / 12, rel=0.2)


def test_short_prompts_fill_the_batch() -> None:
    assert len(fill(Window(batch_tokens=1_000), 100, 0.0)) == 10


def test_tokens_in_flight_stay_within_the_cache() -> None:
    window = Window(batch_tokens=1 << 16, kv_tokens=1_000)
    flights = fill(window, 100, 0.0)
    assert len(flights) == 8  # 950 of 110 each
    for flight in flights:
        window.start(flight, 0.1)
    window.grow(flights[0], 10)  # as expected
    assert window.num_tokens == 880
    window.grow(flights[0], 30)
    assert window.num_tokens == 910


def hungry_steps(window: Window, budget: int, seconds: float, prompt: int = 50) -> list[bool]:
    """An upstream that starts as many waiting prompts in each step of 30 ms as its budget holds, where what is sent to it
    during a step waits for the next; for each step, whether it lacked a prompt that it had room for."""
    now, queue, hungry = 0.0, fill(window, prompt, 0.0), []
    while now < seconds:
        taken, queue = queue[: budget // prompt], queue[budget // prompt :]
        hungry.append(len(taken) < budget // prompt)
        now += 0.03
        for flight in taken:
            window.start(flight, now)
            window.end(flight)
            queue += fill(window, prompt, now + 1e-4)
    return hungry


@pytest.mark.parametrize("budget", [256, 2_048, 8_192])
def test_the_batch_is_learned_from_first_chunks(budget: int) -> None:
    window = Window()
    hungry = hungry_steps(window, budget, 90.0)
    assert 0.9 * budget <= window.batch_tokens <= 3 * budget
    assert sum(hungry[1_500:]) < 0.03 * 1_500


def test_a_silent_request_starts_after_those_before_it() -> None:
    window = Window(prefill_rate=1_000.0)
    window.send(500, 10, 0.0, is_silent=True)
    window.send(500, 10, 0.0, is_silent=True)
    assert window.next_due == 0.5
    window.advance(0.5)
    assert window.num_unstarted == 1 and window.next_due == 1.0
    seen = window.send(10, 10, 0.6)
    window.start(seen, 0.7)  # an upstream begins in order
    assert window.num_unstarted == 0


def test_preemptions_shrink_the_cache_and_a_roomy_one_grows_it() -> None:
    window = Window(kv_tokens=1_000)
    fill(window, 300, 0.0)
    window.correct(Gauges(num_preemptions=0, num_tokens=1), 1.0)
    window.correct(Gauges(num_preemptions=3, num_tokens=2), 2.0)
    assert window.kv_tokens == pytest.approx(0.95 * window.num_tokens)
    shrunk = window.kv_tokens
    assert window.room(300, 10, 2.0) is not Room.FREE
    window.correct(Gauges(num_preemptions=3, kv_usage=0.2, num_tokens=3), 3.0)
    assert window.kv_tokens > shrunk


def test_a_frozen_gauge_says_nothing() -> None:
    window = Window(kv_tokens=1_000)
    fill(window, 300, 0.0)
    frozen = Gauges(num_waiting=50, kv_usage=0.1, num_preemptions=0, num_tokens=7)
    window.correct(frozen, 1.0)
    learned = window.kv_tokens, window.batch_tokens
    for second in range(2, 60):
        window.correct(frozen, float(second))
    assert (window.kv_tokens, window.batch_tokens) == learned


def test_seats_that_the_upstream_names_bound_what_is_in_flight() -> None:
    window = Window()
    window.num_seats = 2
    flights = [window.send(10, 10, 0.0) for _ in range(2)]
    for flight in flights:
        window.start(flight, 1.0)
    assert window.room(1, 1, 1.0) is Room.NONE
    window.end(flights[0])
    assert window.room(1, 1, 1.0) is Room.FREE


def test_a_tenant_that_has_little_in_flight_finds_a_seat_and_tokens_that_others_leave() -> None:
    window = Window(kv_tokens=10_000)  # 9,500 of which may be used
    window.num_seats = 64
    for flight in [window.send(100, 40, 0.0) for _ in range(62)]:
        window.start(flight, 0.1)
    assert window.room(100, 40, 1.0) is Room.RESERVED
    window.num_seats = float("inf")
    assert [window.room(size, 0, 1.0) for size in (800, 900, 1_200)] == [Room.FREE, Room.RESERVED, Room.NONE]
    window.num_seats = 4
    assert window.room(1, 1, 1.0) is Room.NONE
    few = Window()
    few.num_seats = 4
    for _ in range(3):
        few.start(few.send(1, 1, 0.0), 0.1)
    assert few.room(1, 1, 1.0) is Room.FREE, "too few seats to leave one free"
