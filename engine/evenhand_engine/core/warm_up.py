"""Warming a runner up, so that no user waits for what happens at first use."""

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.model.progress import Stage
from evenhand_engine.scheduler.batch import BatchPlan, Runner
from evenhand_engine.scheduler.request import Request, SamplingParams


def run_largest_step(runner: Runner, settings: SchedulerSettings, *, scores_prompt: bool = False) -> None:
    """As many tokens as a step may have, and a token after them; `scores_prompt`: with the logits of all of them."""
    Stage("warming up", total=0)
    num_tokens = min(settings.max_num_batched_tokens, settings.max_model_len - 1)
    num_prompt_logprobs = 0 if scores_prompt else None
    params = SamplingParams(max_tokens=2, temperature=0, num_prompt_logprobs=num_prompt_logprobs)
    request = Request("", "", [0] * num_tokens, params, arrival_time=0.0)
    request.seat, request.block_table = 0, list(range(num_tokens // settings.block_size + 1))
    for step_id in range(2):
        plan = BatchPlan()
        plan.add_chunk(request, request.num_pending_tokens)
        runner.submit(plan.build(step_id, ()))
        runner.collect()
