"""DeviceAdjustments: masks, biases and penalties of the requests on a device, as `adjustments.Adjustments` has them on the CPU.

By seat, made when a request sits down: what its logits are changed by. On the device lie the masks and how often each token has
come, which grows there by what is sampled. A step sends the biases of its rows, and the masks of those whose outputs follow a
grammar. Of bad words the host compares what it knows; the last token may be on the device alone, and is compared there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.device_seats import Samples
from evenhand_engine.core.followers import Mask
from evenhand_engine.core.step_layout import HostStep
from evenhand_engine.scheduler.batch import StartedRequest
from evenhand_engine.scheduler.request import SamplingParams
from evenhand_kernels.cuda.sampling import Adjustments, DeviceSampler
from evenhand_kernels.device import Device


@dataclass
class _Seated:
    """One request. `outputs`: those that the host knows."""

    params: SamplingParams
    outputs: list[int]
    biases: dict[int, float]  # always
    bad_words: tuple[tuple[int, ...], ...]  # of several tokens


class _Biases(NamedTuple):
    """Of one row: the value of each token, and pairs (token, what must have come before) that forbid it."""

    values: dict[int, float]
    forbidden_after: list[tuple[int, int]]


class DeviceAdjustments:
    """Owns the device's memory of masks, a row for each seat and then one for each sample; the sampler has that of counts.

    Where drafts are sampled, which of them count is known when they are accepted: `count` is told.
    """

    def __init__(self, device: Device, sampler: DeviceSampler, settings: SchedulerSettings) -> None:
        num_seats, self._vocab_size = settings.max_num_seqs, sampler.vocab_size
        self._device, self._sampler = device, sampler
        words = -(-self._vocab_size // 32)
        num_masks = num_seats + settings.max_num_outputs
        self._allowed = torch.zeros(num_masks, words, dtype=torch.int32, device=device.torch_device)
        self._allowed_of: dict[int, NDArray[np.int32]] = {}  # by seat, the same on the host
        self._seated: dict[int, _Seated] = {}
        self._adjusts = np.zeros(num_seats, bool)
        self._listens = np.zeros(num_seats, bool)
        self._min_tokens = np.zeros(num_seats, np.int64)  # before which there is a stop token to forbid
        self._mask = np.full(num_seats, -1, np.int32)
        self._penalized = np.full(num_seats, -1, np.int32)
        self._counted = self._penalized if settings.num_speculative_tokens == 0 else np.full(num_seats, -1, np.int32)
        self._repetition = np.ones(num_seats, np.float32)
        self._frequency = np.zeros(num_seats, np.float32)
        self._presence = np.zeros(num_seats, np.float32)

    def take_in(self, started: Sequence[StartedRequest]) -> None:
        """Who sits down. Asks the device to count the tokens of those with penalties."""
        for request in started:
            self._sit_down(request)
        counted = [request for request in started if self._penalized[request.seat] >= 0]
        if counted:
            tokens = np.concatenate([np.array(request.token_ids, np.int32) for request in counted])
            self._sampler.count_tokens(
                seats=self._sent(np.array([request.seat for request in counted], np.int32)),
                token_ids=self._sent(tokens),
                offsets=self._sent(np.cumsum([0, *(len(request.token_ids) for request in counted)], dtype=np.int32)),
                num_prompt=self._sent(np.array([request.num_prompt_tokens for request in counted], np.int32)),
            )

    def concerns(self, seat: int) -> bool:
        """Whether who sits there may have adjustments, or listens."""
        return bool(self._adjusts[seat] or self._listens[seat] or self._min_tokens[seat])

    def write(self, samples: Samples, step: HostStep) -> None:
        """Which rows' tokens are counted as they are sampled, into the part `counted_seats`."""
        step.fill("counted_seats", self._counted[samples.seats])

    def count(self, seats: Sequence[int], token_ids: Sequence[int]) -> None:
        """These outputs of these seats are accepted."""
        counted = [pair for pair in zip(seats, token_ids, strict=True) if self._penalized[pair[0]] >= 0]
        if counted:
            pairs = self._sent(np.array(counted, np.int64))
            self._sampler.count_outputs(pairs[:, 0], pairs[:, 1])

    def listeners(self, samples: Samples) -> list[tuple[int, Callable[[Sequence[int]], None]]]:
        """Numbers of items with samples, and who must be told of their tokens when the host knows them, whoever sits there
        by then."""
        seats = np.delete(samples.seats, list(samples.drafts)) if samples.drafts else samples.seats
        numbers = self._listens[seats].nonzero()[0].tolist()
        return [(number, self._seated[int(seats[number])].outputs.extend) for number in numbers]

    def of(self, samples: Samples, masks: Mapping[int, Mask], last_token_ids: Tensor) -> Adjustments | None:
        """Those of a step's rows; None where there are none.

        Args:
            masks: by row, of grammars.
            last_token_ids: by seat, on the device.
        """
        seats = samples.seats
        is_adjusted = self._adjusts[seats] | (samples.indices < self._min_tokens[seats])
        is_adjusted[list(masks)] = True
        rows = is_adjusted.nonzero()[0]
        if not len(rows):
            return None
        seats, indices = seats[rows], samples.indices[rows]
        places = np.full(len(samples.seats), -1, np.int32)
        places[rows] = np.arange(len(rows))
        drafts = [samples.drafts.get(row, ()) for row in rows.tolist()]
        biases = [
            self._biases(self._seated[seat], index, before)
            for seat, index, before in zip(seats.tolist(), indices.tolist(), drafts, strict=True)
        ]
        counts = [len(of_row.values) for of_row in biases]
        tokens = np.array([token for of_row in biases for token in of_row.values], np.int32)
        draft_offsets = np.cumsum([0, *map(len, drafts)], dtype=np.int32)
        draft_tokens = np.array([token for before in drafts for token in before], np.int32)
        return Adjustments(
            rows=self._sent(rows.astype(np.int32)),
            adjusted_row=self._sent(places),
            seats=self._sent(self._penalized[seats]),
            repetition=self._sent(self._repetition[seats]),
            frequency=self._sent(self._frequency[seats]),
            presence=self._sent(self._presence[seats]),
            allowed=self._allowed,
            masks=self._sent(self._masks_of(samples, masks)[rows]),
            bias_offsets=self._sent(np.cumsum([0, *counts], dtype=np.int32)),
            bias_tokens=self._sent(tokens),
            bias_values=self._values(biases, seats, last_token_ids),
            draft_offsets=self._sent(draft_offsets) if samples.drafts else None,
            draft_tokens=self._sent(draft_tokens) if samples.drafts else None,
        )

    def _masks_of(self, samples: Samples, masks: Mapping[int, Mask]) -> NDArray[np.int32]:
        """For each sample its row of masks on the device, or -1. Sends those of this step."""
        found = self._mask[samples.seats]
        if masks:
            first, rows = len(self._mask), list(masks)
            words = [
                mask & self._allowed_of[seat] if (seat := int(samples.seats[row])) in self._allowed_of else mask
                for row, mask in masks.items()
            ]
            self._allowed[first : first + len(rows)] = self._sent(np.stack(words))
            found[rows] = first + np.arange(len(rows))
        return found

    def _sit_down(self, started: StartedRequest) -> None:
        seat, params = started.seat, started.sampling_params
        forbidden = {words[-1]: -np.inf for words in params.bad_words_token_ids if len(words) == 1}
        longer = tuple(words for words in params.bad_words_token_ids if len(words) > 1)
        biases = dict(params.logit_bias) | forbidden
        outputs = list(started.token_ids[started.num_prompt_tokens :]) if longer else []
        self._seated[seat] = _Seated(params, outputs, biases, longer)
        penalized = params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
        self._penalized[seat] = seat if penalized else -1
        self._repetition[seat] = params.repetition_penalty
        self._frequency[seat], self._presence[seat] = params.frequency_penalty, params.presence_penalty
        self._min_tokens[seat] = params.min_tokens if params.stop_token_ids else 0
        self._mask[seat] = -1 if params.allowed_token_ids is None else seat
        self._allowed_of.pop(seat, None)
        if params.allowed_token_ids is not None:
            self._allowed_of[seat] = _mask(params.allowed_token_ids, self._vocab_size)
            self._allowed[seat] = self._sent(self._allowed_of[seat])
        self._listens[seat] = bool(longer)
        self._adjusts[seat] = penalized or params.allowed_token_ids is not None or bool(biases) or bool(longer)

    def _biases(self, request: _Seated, index: int, drafts: tuple[int, ...]) -> _Biases:
        """Of the token after `index` outputs, the last of them `drafts`; the others the host knows, or all but the last."""
        values, forbidden_after, outputs = dict(request.biases), [], request.outputs
        if drafts:
            outputs = [*outputs, *drafts]
        if index < request.params.min_tokens:
            values |= dict.fromkeys(request.params.stop_token_ids, -np.inf)
        is_last_known = len(outputs) == index
        assert is_last_known or len(outputs) == index - 1 or not request.bad_words
        for *before, last in request.bad_words:
            compared = before if is_last_known else before[:-1]
            if len(before) > index or outputs[len(outputs) - len(compared) :] != compared:
                continue
            if is_last_known:
                values[last] = -np.inf
            else:
                values.setdefault(last, 0.0)
                forbidden_after.append((last, before[-1]))
        return _Biases(values, forbidden_after)

    def _values(self, biases: list[_Biases], seats: NDArray[np.int64], last_token_ids: Tensor) -> Tensor:
        """float32, of all rows' biases: what the last token forbids is known on the device alone."""
        values = self._sent(np.array([value for of_row in biases for value in of_row.values.values()], np.float32))
        places, owners, required, first = [], [], [], 0
        for of_row, seat in zip(biases, seats.tolist(), strict=True):
            order = {token: first + place for place, token in enumerate(of_row.values)}
            for token, before in of_row.forbidden_after:
                places.append(order[token])
                owners.append(seat)
                required.append(before)
            first += len(of_row.values)
        if places:
            follows = last_token_ids[self._sent(np.array(owners))] == self._sent(np.array(required, np.int32))
            values.index_add_(0, self._sent(np.array(places)), torch.where(follows, -torch.inf, 0.0))
        return values

    def _sent(self, array: NDArray[np.generic]) -> Tensor:
        return sent(self._device, array)


def _mask(token_ids: frozenset[int], vocab_size: int) -> NDArray[np.int32]:
    """int32 [ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is set for each token t of these."""
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def sent(device: Device, array: NDArray[np.generic]) -> Tensor:
    """A small array on the device, without waiting for it."""
    host = torch.from_numpy(array)
    pinned = device.pinned(*host.shape, dtype=host.dtype)
    pinned.copy_(host)
    return pinned.to(device.torch_device, non_blocking=True)
