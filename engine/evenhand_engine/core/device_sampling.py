"""StepSampler: tokens of a device's step, from its logits to the host, without waiting for either."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_adjustments import DeviceAdjustments, sent
from evenhand_engine.core.device_seats import DeviceSeats, Samples
from evenhand_engine.core.followers import Mask
from evenhand_engine.core.prompt_logprobs import ScoredPart
from evenhand_engine.core.sampler import Token, accept
from evenhand_engine.core.step_layout import DeviceStep, HostStep
from evenhand_engine.core.structures import StructuredStep
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled, TokenLogprobs
from evenhand_kernels.cuda.sampling import DeviceSampler
from evenhand_kernels.device import Device, Event

NO_TOKEN = -1
"""Stands for the token of a row whose logits are not finite, or allow none."""

SCORED_ROWS = 256
"""Of prompts, that are described at a time: what memory this takes beside their logits."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A batch that is being computed.

    Attributes:
        samples: its rows of logits that are sampled.
        scored: the parts of prompts whose rows of logits follow.
        structured: its items whose outputs follow a grammar.
    """

    batch: Batch
    samples: Samples
    scored: Sequence[ScoredPart]
    structured: StructuredStep | None


@dataclass(frozen=True, slots=True)
class _Told:
    """Log probabilities on their way to the host.

    `words`, int32 [num_rows, 2 + 2 * num_top], holds for each row its token's log probability (a float32) and rank, the top
    ids, and their log probabilities (float32).
    """

    num_top: int
    words: Tensor

    def entry(self, row: int, number: int) -> TokenLogprobs:
        """Of a row, with so many of the likeliest tokens."""
        words, num_top = self.words.numpy()[row], self.num_top
        floats, number = words.view(np.float32), min(number, num_top)
        return TokenLogprobs(
            logprob=float(floats[0]),
            rank=int(words[1]),
            top_token_ids=tuple(words[2 : 2 + number].tolist()),
            top_logprobs=tuple(floats[2 + num_top : 2 + num_top + number].tolist()),
        )


class SamplingStep:
    """What a submitted step samples, on its way to the host."""

    def __init__(
        self,
        planned: Planned,
        event: Event,
        token_ids: Tensor,
        asked: Mapping[int, int],
        told: _Told | None,
        of_prompts: _Told | None,
        listeners: Sequence[tuple[int, Callable[[Sequence[int]], None]]],
    ) -> None:
        """`token_ids`: int32, pinned. `asked`: by row of the samples, of how many likeliest tokens `told` tells."""
        self.planned = planned
        self._event = event
        self._token_ids = token_ids
        self._asked, self._told, self._of_prompts = asked, told, of_prompts
        self._listeners = listeners
        self._results: list[Sampled] | None = None
        self._error: Exception | None = None

    def wait(self) -> list[Sampled]:
        """Block until it has come, and tell who goes on from there; one result for each item with samples.

        Who has failed once fails again: a part of those who go on may have been told.
        """
        if self._error is not None:
            raise self._error
        if self._results is None:
            try:
                self._results = self._take()
            except Exception as error:
                self._error = error
                raise
        return self._results

    def _take(self) -> list[Sampled]:
        self._event.wait()
        results = self._read()
        for number, take in self._listeners:
            take(results[number].token_ids)
        if self.planned.structured is not None:
            self.planned.structured.advance(results)
        return results

    def _read(self) -> list[Sampled]:
        token_ids, told = self._token_ids.tolist(), self._told
        entries = (
            {} if told is None else {row: told.entry(place, self._asked[row]) for place, row in enumerate(self._asked)}
        )
        if self.planned.samples.drafts:
            tokens = [
                None if token_id == NO_TOKEN else Token(token_id, entries.get(row))
                for row, token_id in enumerate(token_ids)
            ]
            results = accept(self.planned.batch, tokens)
        else:
            results = list(map(Sampled, zip(token_ids, strict=True)))
            if NO_TOKEN in token_ids:
                results = [result if result.token_ids != (NO_TOKEN,) else Sampled(()) for result in results]
            for row, entry in entries.items():
                results[row] = msgspec.structs.replace(results[row], logprobs=(entry,))
        self._score(results)
        return results

    def _score(self, results: list[Sampled]) -> None:
        """Tell what prompts scored, with the results of those that end."""
        first = 0
        for part in self.planned.scored:
            found = self._of_prompts
            rows = range(first, first + len(part.rows))
            prompt_logprobs = part.tell([] if found is None else [found.entry(row, part.num_top) for row in rows])
            first += len(part.rows)
            if part.number is not None:
                results[part.number] = msgspec.structs.replace(results[part.number], prompt_logprobs=prompt_logprobs)


class StepSampler:
    """Asks for the sampling of each step."""

    def __init__(self, device: Device, sampler: DeviceSampler, seats: DeviceSeats, settings: SchedulerSettings) -> None:
        """`sampler` counts the tokens of as many seats as there are."""
        self._device, self._sampler, self._seats = device, sampler, seats
        self._adjustments = DeviceAdjustments(device, sampler, settings)
        self._asks_more = np.zeros(settings.max_num_seqs, bool)  # by seat, than to draw from the logits

    def take_in(self, batch: Batch) -> None:
        """Who sits down."""
        self._adjustments.take_in(batch.started)
        for started in batch.started:
            asks_for_logprobs = started.sampling_params.num_logprobs is not None
            self._asks_more[started.seat] = asks_for_logprobs or self._adjustments.concerns(started.seat)

    def write(self, samples: Samples, step: HostStep) -> None:
        """How each row is sampled, into the step's parts for samples."""
        self._seats.write_sampling(samples.seats, step)
        step.fill("indices", samples.indices, np.int64)
        self._adjustments.write(samples, step)

    def sample(self, planned: Planned, step: DeviceStep, logits: Tensor, masks: Mapping[int, Mask]) -> SamplingStep:
        """Draw from the first rows of `logits`, [at least the numbers of samples and of scored rows, vocab_size], and start
        the way to the host.

        The tokens are the seats' last ones on the device at once, for the next step, which may be laid out before the host
        has them. But where there are drafts, the host is waited for: it accepts them. `masks`: by row, of grammars.
        """
        samples, scored = planned.samples, planned.scored
        num_rows = len(samples.seats)
        token_ids = self._device.pinned(num_rows, dtype=torch.int32)
        of_prompts = self._scored(scored, logits[num_rows:]) if any(part.rows for part in scored) else None
        asked: Mapping[int, int] = {}
        told: _Told | None = None
        listeners: Sequence[tuple[int, Callable[[Sequence[int]], None]]] = ()
        if num_rows:
            logits, on_device = logits[:num_rows], step.samples(num_rows)
            asks_more = bool(masks) or bool(self._asks_more[samples.seats].any())
            adjustments = self._adjustments.of(samples, masks, self._seats.last_token_ids) if asks_more else None
            sampled = self._sampler.sample(logits, on_device.rows, adjustments)
            token_ids.copy_(sampled, non_blocking=True)
            sampled = sampled.clamp(min=0)  # a request without a token has a step in flight that reads one
            if not samples.drafts:
                self._seats.last_token_ids.index_copy_(0, on_device.seats, sampled)
            if asks_more:
                asked, told = self._asked(samples, logits, sampled)
                listeners = self._adjustments.listeners(samples)
        return SamplingStep(planned, self._device.record(), token_ids, asked, told, of_prompts, listeners)

    def count(self, seats: Sequence[int], token_ids: Sequence[int]) -> None:
        """These outputs of these seats are accepted, where the steps have drafts."""
        self._adjustments.count(seats, token_ids)

    def _asked(self, samples: Samples, logits: Tensor, sampled: Tensor) -> tuple[dict[int, int], _Told | None]:
        """By row, of how many likeliest tokens a request asks to be told; and these, on their way."""
        wanted = self._seats.num_logprobs[samples.seats]
        asked = {row: int(wanted[row]) for row in (wanted >= 0).nonzero()[0].tolist()}
        if not asked:
            return asked, None
        rows = sent(self._device, np.array(list(asked), np.int64))
        return asked, self._on_its_way([self._described(logits[rows], sampled[rows], max(asked.values()))])

    def _scored(self, scored: Sequence[ScoredPart], logits: Tensor) -> _Told:
        tokens = sent(self._device, np.concatenate([np.array(part.token_ids, np.int32) for part in scored]))
        num_top = max(part.num_top for part in scored)
        pieces = (slice(first, first + SCORED_ROWS) for first in range(0, len(tokens), SCORED_ROWS))
        return self._on_its_way([self._described(logits[piece], tokens[piece], num_top) for piece in pieces])

    def _described(self, logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
        """The words of `_Told`, on the device; for one of the likeliest tokens at least."""
        found = self._sampler.log_probabilities(logits, token_ids, max(1, num_top))
        own = logits.gather(1, token_ids.long()[:, None])
        rank = (logits > own).sum(dim=1, dtype=torch.int32) + 1
        parts = (found.sampled[:, None].view(torch.int32), rank[:, None], found.top_ids, found.top.view(torch.int32))
        return torch.cat(parts, dim=1)

    def _on_its_way(self, pieces: Sequence[Tensor]) -> _Told:
        words = torch.cat(list(pieces))
        host = self._device.pinned(*words.shape, dtype=torch.int32)
        host.copy_(words, non_blocking=True)
        return _Told((words.shape[1] - 2) // 2, host)
