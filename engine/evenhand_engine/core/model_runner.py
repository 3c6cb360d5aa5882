"""ModelRunner: computes batches with a model on the CPU."""

from collections import deque

import torch

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.sampler import Seats, accept, sample
from evenhand_engine.core.staging import Staging
from evenhand_engine.model.decoder import Decoder, forward
from evenhand_engine.scheduler.batch import Batch, BatchPlan
from evenhand_engine.scheduler.request import Request, Sampled, SamplingParams


class ModelRunner:
    """Implements `Runner` on the CPU: `submit` computes, `collect` returns what it sampled.

    Its own state is the content of the KV cache, and by seat the tokens and block table of who runs.
    """

    def __init__(self, decoder: Decoder, settings: SchedulerSettings) -> None:
        self._decoder = decoder
        self._staging = Staging(settings, decoder.kernels)
        self._seats = Seats()
        self._results: deque[list[Sampled]] = deque()

    @property
    def pipeline_depth(self) -> int:
        return 1

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        model_input = self._staging.fill(batch)
        rows = self._seats.prepare(batch)
        logits = forward(self._decoder, model_input)
        results = accept(batch, sample(logits, rows, self._decoder.kernels))
        for item, result in zip((item for item in batch.scheduled if item.num_samples), results, strict=True):
            first = item.num_computed_tokens + item.num_scheduled_tokens - item.num_samples + 1
            self._staging.append(item.seat, first, result.token_ids)
        self._results.append(results)

    def collect(self) -> list[Sampled]:
        return self._results.popleft()

    def warm_up(self, settings: SchedulerSettings) -> None:
        """Run a full step and a decode, so that no user waits for what happens at first use."""
        num_tokens = min(settings.max_num_batched_tokens, settings.max_model_len - 1)
        request = Request("", "", [0] * num_tokens, SamplingParams(max_tokens=2, temperature=0), arrival_time=0.0)
        request.seat = 0
        request.block_table = list(range(num_tokens // settings.block_size + 1))
        for step_id in range(2):
            plan = BatchPlan()
            plan.add_chunk(request, request.num_pending_tokens)
            self.submit(plan.build(step_id, ()))
            self.collect()
