"""ModelRunner: computes batches with a model on the CPU, or one by one with the reference kernels on a GPU."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.prompt_logprobs import PromptLogprobs, ScoredPart
from evenhand_engine.core.sampler import Seats, accept, sample
from evenhand_engine.core.staging import Staging
from evenhand_engine.core.structures import Structures
from evenhand_engine.core.token_logprobs import describe
from evenhand_engine.model.decoder import Decoder, forward
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled, TokenLogprobs
from evenhand_kernels.kernels import Kernels

_ROWS = 16  # of prompts at a time: of a whole step, copies would take hundreds of megabytes


class ModelRunner:
    """Implements `Runner` without looking ahead: `submit` computes, `collect` returns what it sampled.

    Its own state is the content of the KV cache, and by seat the tokens and block table of who runs.
    """

    def __init__(self, decoder: Decoder, settings: SchedulerSettings, structures: Structures) -> None:
        """`structures`: grammars of requests, told before they are scheduled."""
        self._decoder = decoder
        self._structures = structures
        self._staging = Staging(settings, decoder.kernels)
        self._prompt_logprobs = PromptLogprobs()
        self._seats = Seats(self._staging.token_ids)
        self._thread = ThreadPoolExecutor(1, "masks")  # that are computed while the step runs
        self._results: deque[list[Sampled]] = deque()

    @property
    def pipeline_depth(self) -> int:
        return 1

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        parts = self._prompt_logprobs.begin(batch)
        prompt_rows = [row for part in parts for row in part.rows]
        model_input = self._staging.fill(batch, prompt_rows)
        rows = self._seats.prepare(batch)
        structured = self._structures.begin(batch)
        masks = None if structured is None else self._thread.submit(structured.masks)
        logits = forward(self._decoder, model_input).cpu()
        of_prompts: dict[int, tuple[TokenLogprobs, ...]] = {}
        if parts:
            places = np.searchsorted(model_input.logits_indices.cpu().numpy(), prompt_rows)
            of_prompts = _score(self._decoder.kernels, parts, logits, places)
            logits = logits[np.delete(np.arange(len(logits)), places)]
        found = {} if masks is None else masks.result()
        results = accept(batch, sample(logits, rows, self._decoder.kernels, found))
        if structured is not None:
            structured.advance(results)
        for number, told in of_prompts.items():
            results[number] = msgspec.structs.replace(results[number], prompt_logprobs=told)
        for item, result in zip((item for item in batch.scheduled if item.num_samples), results, strict=True):
            self._staging.append(item.seat, item.first_output, result.token_ids)
        self._results.append(results)

    def collect(self) -> list[Sampled]:
        return self._results.popleft()


def _score(
    kernels: Kernels, parts: Sequence[ScoredPart], logits: Tensor, places: NDArray[np.intp]
) -> dict[int, tuple[TokenLogprobs, ...]]:
    """By item with samples, what is told of the prompts that end. `places`: of the parts' rows among those of `logits`."""
    ended, first = {}, 0
    for part in parts:
        wanted = places[first : first + len(part.token_ids)]
        first += len(part.token_ids)
        told = part.tell(_described(kernels, part, logits, wanted))
        if part.number is not None:
            ended[part.number] = told
    return ended


def _described(kernels: Kernels, part: ScoredPart, logits: Tensor, places: NDArray[np.intp]) -> Iterator[TokenLogprobs]:
    for start in range(0, len(places), _ROWS):
        token_ids = part.token_ids[start : start + _ROWS]
        rows = logits[places[start : start + _ROWS]]
        yield from describe(kernels, rows, token_ids, [part.num_top] * len(token_ids))
