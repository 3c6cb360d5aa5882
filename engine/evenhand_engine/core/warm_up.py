"""Warming a runner up, so that no user waits for what happens at first use; and what is measured by the way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.scheduler.batch import BatchPlan, Runner
from evenhand_engine.scheduler.request import Request, SamplingParams

_REPEATS = 2  # the fastest counts: the first one of its size touches memory, and another process may have the core
_NEARLY = 0.97  # of the best rate: what is lost of it is less than a machine varies
_SECONDS_ENOUGH = 0.2  # a step that takes longer is long enough, whatever a larger one would give


def run_largest_step(runner: Runner, settings: SchedulerSettings, *, scores_prompt: bool = False) -> None:
    """As many tokens as a step may have, and a token after them; `scores_prompt`: with the logits of all of them."""
    num_tokens = min(settings.max_num_batched_tokens, settings.max_model_len - 1)
    _run_prompt(runner, settings, num_tokens, max_tokens=2, num_prompt_logprobs=0 if scores_prompt else None)


def measured_token_budget(
    runner: Runner, settings: SchedulerSettings, budgets: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> int:
    """The least of these, which ascend, by which prompts are computed nearly as fast as by the best.

    More tokens in a step than that add nothing but to the time for which streams and newcomers wait. The runner may be cold, and is
    warm then for steps of that size. Steps that are larger than any that will come are run only to be measured: they take long.
    """
    run_largest_step(runner, replace(settings, max_num_batched_tokens=budgets[0]))
    rates: dict[int, float] = {}
    for budget in budgets:
        num_tokens = min(budget, settings.max_model_len - 1)
        seconds: list[float] = []
        while len(seconds) < _REPEATS and sum(seconds) < _SECONDS_ENOUGH:
            started_at = clock()
            _run_prompt(runner, settings, num_tokens)
            seconds.append(clock() - started_at)
        best, rates[budget] = max(rates.values(), default=0.0), num_tokens / min(seconds)
        if min(seconds) >= _SECONDS_ENOUGH or best >= _NEARLY * rates[budget]:
            break
    return next(budget for budget, rate in rates.items() if rate >= _NEARLY * max(rates.values()))


def _run_prompt(
    runner: Runner,
    settings: SchedulerSettings,
    num_tokens: int,
    *,
    max_tokens: int = 1,
    num_prompt_logprobs: int | None = None,
) -> None:
    """So many tokens in one step, and what follows them one by one."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, num_prompt_logprobs=num_prompt_logprobs)
    request = Request("", "", [0] * num_tokens, params, arrival_time=0.0)
    request.seat, request.block_table = 0, list(range(num_tokens // settings.block_size + 1))
    for step_id in range(max_tokens):
        plan = BatchPlan()
        plan.add_chunk(request, request.num_pending_tokens)
        runner.submit(plan.build(step_id, ()))
        runner.collect()
