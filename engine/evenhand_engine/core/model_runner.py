"""ModelRunner: computes batches with a model on the CPU, or one by one with the reference kernels on a GPU."""

from collections import deque

import msgspec
import numpy as np
import torch

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.prompt_logprobs import PromptLogprobs
from evenhand_engine.core.sampler import Seats, accept, sample
from evenhand_engine.core.staging import Staging
from evenhand_engine.core.structures import Structures
from evenhand_engine.model.decoder import Decoder, forward
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import FinishReason, Sampled


class ModelRunner:
    """Implements `Runner` without looking ahead: `submit` computes, `collect` returns what it sampled.

    Its own state is the content of the KV cache, and by seat the tokens and block table of who runs.
    """

    def __init__(self, decoder: Decoder, settings: SchedulerSettings, structures: Structures) -> None:
        """`structures`: grammars of requests, told before they are scheduled."""
        self._decoder = decoder
        self._structures = structures
        self._staging = Staging(settings, decoder.kernels)
        self._prompt_logprobs = PromptLogprobs(self._staging.token_ids)
        self._seats = Seats(self._staging.token_ids)
        self._results: deque[list[Sampled]] = deque()

    @property
    def pipeline_depth(self) -> int:
        return 1

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        prompt_rows = self._prompt_logprobs.rows(batch)
        model_input = self._staging.fill(batch, prompt_rows)
        rows = self._seats.prepare(batch)
        masks = self._structures.begin(batch)
        logits = forward(self._decoder, model_input).cpu()
        places = np.searchsorted(model_input.logits_indices.cpu().numpy(), prompt_rows)
        of_prompts = self._prompt_logprobs.take(batch, logits, places)
        if prompt_rows:
            logits = logits[np.delete(np.arange(len(logits)), places)]
        forbidden = {} if masks is None else masks.result()
        results = accept(batch, sample(logits, rows, self._decoder.kernels, forbidden))
        self._structures.advance(batch, results)
        for number, item in enumerate(item for item in batch.scheduled if item.num_samples):
            result = results[number]
            if not result.token_ids and self._structures.has_failed(item.seat):
                result = results[number] = Sampled((), failure=FinishReason.GRAMMAR)
            if item.seat in of_prompts:
                results[number] = msgspec.structs.replace(result, prompt_logprobs=of_prompts[item.seat])
            first = item.num_computed_tokens + item.num_scheduled_tokens - item.num_samples + 1
            self._staging.append(item.seat, first, result.token_ids)
        self._results.append(results)

    def collect(self) -> list[Sampled]:
        return self._results.popleft()
