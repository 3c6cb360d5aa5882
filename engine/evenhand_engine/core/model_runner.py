"""ModelRunner: computes batches with a model on the CPU."""

from collections import deque

import torch

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.sampler import Seats, accept, sample
from evenhand_engine.core.staging import Staging
from evenhand_engine.model.decoder import Decoder, forward
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled


class ModelRunner:
    """Implements `Runner` on the CPU: `submit` computes, `collect` returns what it sampled.

    Its own state is the content of the KV cache, and by seat the tokens and block table of who runs.
    """

    def __init__(self, decoder: Decoder, settings: SchedulerSettings) -> None:
        self._decoder = decoder
        self._staging = Staging(settings, decoder.kernels)
        self._seats = Seats(self._staging.token_ids)
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
