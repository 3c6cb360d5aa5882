"""The token budget of a step that is chosen by measuring."""

from collections.abc import Callable

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.warm_up import measured_token_budget
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled

SETTINGS = SchedulerSettings(max_num_batched_tokens=256, max_model_len=1024)
BUDGETS = (64, 128, 256)


class TimedRunner:
    """Takes as long for a step as `seconds` says of its number of tokens; notes these numbers."""

    pipeline_depth = 1

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now = 0.0
        self.sizes: list[int] = []
        self._seconds = seconds

    def submit(self, batch: Batch) -> None:
        self.sizes.append(batch.num_tokens)
        self.now += self._seconds(batch.num_tokens)

    def collect(self) -> list[Sampled]:
        return [Sampled((1,))]

    def choose(self, settings: SchedulerSettings = SETTINGS) -> int:
        return measured_token_budget(self, settings, BUDGETS, lambda: self.now)


@pytest.mark.parametrize(("per_step", "expected"), [(0.0, 64), (1e-3, 64), (8e-3, 128), (32e-3, 256)])
def test_it_is_the_least_that_is_nearly_as_fast_as_the_best(per_step: float, expected: int) -> None:
    """A step costs so much, and each token a millisecond."""
    assert TimedRunner(lambda n: per_step + 1e-3 * n).choose() == expected


def test_a_slow_start_is_not_what_counts() -> None:
    """Neither that of the runner nor that of a size."""
    runner = TimedRunner(lambda n: 1e-3 * n + {1: 9.0, 3: 0.1, 5: 0.05}.get(len(runner.sizes), 0.0))
    assert runner.choose() == 64 and runner.sizes == [64, 1, 64, 64, 128, 128]


def test_no_step_is_larger_than_what_is_measured() -> None:
    """Of a budget that is not chosen because smaller ones are as good, nothing is run; what is chosen has run."""
    runner = TimedRunner(lambda n: 0.02 * n)
    assert runner.choose() == 64 and runner.sizes == [64, 1, 64]


def test_larger_steps_are_not_tried_once_they_win_nothing_or_are_long() -> None:
    falling = TimedRunner(lambda n: 1e-5 * n * n)
    assert falling.choose() == 64 and max(falling.sizes) == 128
    slow = TimedRunner(lambda n: 0.02 * n)
    assert slow.choose() == 64 and max(slow.sizes) == 64


def test_a_context_shorter_than_a_step_is_enough() -> None:
    runner = TimedRunner(lambda n: 1e-3 * n)
    assert runner.choose(SchedulerSettings(max_num_batched_tokens=256, max_model_len=40)) == 64
    assert max(runner.sizes) == 39
