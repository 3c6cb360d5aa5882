"""StepSampler: tokens of a device's step, from its logits to the host, without waiting for either."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_adjustments import DeviceAdjustments, Samples, sent
from evenhand_engine.core.device_seats import DeviceSeats
from evenhand_engine.core.step_layout import DeviceStep, HostStep
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled, TokenLogprobs
from evenhand_kernels.cuda.sampling import DeviceSampler, SamplingRows
from evenhand_kernels.device import Device, Event

NO_TOKEN = -1
"""Stands for the token of a row whose logits are not finite, or allow none."""


@dataclass(frozen=True, slots=True)
class _Told:
    """Log probabilities of some rows, on their way to the host.

    `words`, int32 [num_rows, 2 + 2 * num_top], holds for each row its token's log probability (a float32) and rank, the top
    ids, and their log probabilities (float32).
    """

    rows: list[tuple[int, int]]  # of the step's samples, with how many of the top each asked for
    num_top: int
    words: Tensor


Noted = dict[int, Callable[[int], None]]
"""By row of a step's samples: who must be told of its token."""


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """What a submitted step samples, on its way to the host."""

    event: Event
    token_ids: Tensor  # int32, pinned
    told: _Told | None
    noted: Noted

    def wait(self) -> list[Sampled]:
        """Block until it has come; one result for each item with samples."""
        self.event.wait()
        token_ids = self.token_ids.tolist()
        told = {} if self.told is None else _read(self.told)
        for row, note in self.noted.items():
            note(token_ids[row])
        return [
            Sampled(() if token_id == NO_TOKEN else (token_id,), (told[row],) if row in told else ())
            for row, token_id in enumerate(token_ids)
        ]


class StepSampler:
    """Asks for the sampling of each step."""

    def __init__(self, device: Device, sampler: DeviceSampler, seats: DeviceSeats, settings: SchedulerSettings) -> None:
        """`sampler` counts the tokens of as many seats as there are."""
        self._device, self._sampler, self._seats = device, sampler, seats
        self._adjustments = DeviceAdjustments(device, sampler, settings)

    def take_in(self, batch: Batch) -> None:
        """Who sits down."""
        self._adjustments.take_in(batch.started)

    def write(self, samples: Samples, step: HostStep) -> None:
        """How each row is sampled, into the step's parts for samples."""
        self._seats.write_sampling(samples.seats, step)
        step.fill("indices", samples.indices, np.int64)
        self._adjustments.write(samples, step)

    def sample(self, samples: Samples, step: DeviceStep, logits: Tensor) -> SamplingStep:
        """Draw from the rows of `logits`, [at least the number of samples, vocab_size], and start the way to the host.

        The tokens are the seats' last ones on the device at once, for the next step.
        """
        num_rows = len(samples.seats)
        token_ids = self._device.pinned(num_rows, dtype=torch.int32)
        told = None
        if num_rows:
            logits = logits[:num_rows]
            rows = SamplingRows(
                temperature=step.part("temperature", torch.float32)[:num_rows],
                top_p=step.part("top_p", torch.float32)[:num_rows],
                min_p=step.part("min_p", torch.float32)[:num_rows],
                top_k=step.part("top_k")[:num_rows],
                seeds=step.part("seeds", torch.int64)[:num_rows],
                indices=step.part("indices", torch.int64)[:num_rows],
                seats=step.part("counted_seats")[:num_rows],
            )
            adjustments = self._adjustments.of(samples, self._seats.last_token_ids)
            sampled = self._sampler.sample(logits, rows, adjustments)
            token_ids.copy_(sampled, non_blocking=True)
            sampled = sampled.clamp(min=0)  # a request without a token has a step in flight that reads one
            self._seats.last_token_ids[step.part("sample_seats")[:num_rows]] = sampled
            told = self._log_probabilities(samples, logits, sampled)
        return SamplingStep(self._device.record(), token_ids, told, self._adjustments.listeners(samples))

    def _log_probabilities(self, samples: Samples, logits: Tensor, sampled: Tensor) -> _Told | None:
        wanted = self._seats.num_logprobs[samples.seats]
        asked = {row: int(wanted[row]) for row in (wanted >= 0).nonzero()[0].tolist()}
        if not asked:
            return None
        rows, num_top = sent(self._device, np.array(list(asked), np.int64)), max(1, *asked.values())
        logits, tokens = logits[rows], sampled[rows]
        found = self._sampler.log_probabilities(logits, tokens, num_top)
        own = logits.gather(1, tokens.long()[:, None])
        rank = (logits > own).sum(dim=1, dtype=torch.int32) + 1
        words = torch.cat(
            (found.sampled[:, None].view(torch.int32), rank[:, None], found.top_ids, found.top.view(torch.int32)), dim=1
        )
        host = self._device.pinned(*words.shape, dtype=torch.int32)
        host.copy_(words, non_blocking=True)
        return _Told(list(asked.items()), found.top_ids.shape[1], host)


def _read(told: _Told) -> dict[int, TokenLogprobs]:
    """By row of the step's samples."""
    words, num_top = told.words.numpy(), told.num_top
    floats = words.view(np.float32)
    return {
        row: TokenLogprobs(
            logprob=float(floats[place, 0]),
            rank=int(words[place, 1]),
            top_token_ids=tuple(words[place, 2 : 2 + min(number, num_top)].tolist()),
            top_logprobs=tuple(floats[place, 2 + num_top : 2 + num_top + min(number, num_top)].tolist()),
        )
        for place, (row, number) in enumerate(told.rows)
    }
