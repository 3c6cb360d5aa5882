"""DeviceSeats: what a device runner knows of each seat, on the host and on the device; and where a step's rows come from.

On the host, where steps are laid out: the tokens that the scheduler told, and how the request is sampled. On the device, where
they are needed before the host knows them: the last sampled token, and the block table. Both grow by what batches tell.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.prompt_logprobs import ScoredPart
from evenhand_engine.core.step_layout import BY_SEAT, DeviceStep, HostStep
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest

ON_DEVICE = -1
"""Stands for a token in a step's token ids that only the device knows."""

_SEAT, _NUM_COMPUTED, _NUM_SCHEDULED, _NUM_SAMPLES = map(
    attrgetter, ("seat", "num_computed_tokens", "num_scheduled_tokens", "num_samples")
)


class Samples(NamedTuple):
    """The rows of a step's logits that are sampled.

    Attributes:
        seats, indices: int64, whose each is, and how many outputs that one has by then.
        drafts: by row, the guessed outputs that it stands behind; nothing where there are none.
    """

    seats: NDArray[np.int64]
    indices: NDArray[np.int64]
    drafts: Mapping[int, tuple[int, ...]] = {}


class DeviceSeats:
    """The last seat is nobody's: padding sits there, and has no blocks, so that it is written nowhere.

    Attributes:
        last_token_ids: int32 [num_seats + 1] on the device, what each seat sampled last.
        block_tables: int32 [num_seats + 1, max_num_blocks] on the device.
        temperature, top_p, min_p, top_k, seeds, num_prompt_tokens: by seat, on the host, as each request asks.
        num_logprobs: of how many of the likeliest tokens it wants to be told; -1: it does not ask.
    """

    def __init__(self, settings: SchedulerSettings, device: torch.device) -> None:
        self.nobody = settings.max_num_seqs
        self.max_num_blocks = -(-settings.max_model_len // settings.block_size)
        num_seats = self.nobody + 1
        self.last_token_ids = torch.zeros(num_seats, dtype=torch.int32, device=device)
        self.block_tables = torch.full((num_seats, self.max_num_blocks), -1, dtype=torch.int32, device=device)
        self._by_seat = np.zeros((len(BY_SEAT), num_seats), np.int32)  # as steps have it: one look-up finds all
        self.temperature, self.top_p, self.min_p = self._by_seat[:3].view(np.float32)
        self.top_k = self._by_seat[3]
        self.seeds = np.zeros(num_seats, np.uint64)
        self.num_prompt_tokens = np.zeros(num_seats, np.int64)
        self.num_logprobs = np.full(num_seats, -1, np.int64)
        self._token_ids = np.zeros((num_seats, settings.max_model_len + 1), np.int32)
        self._num_known = np.zeros(num_seats, np.int64)
        self._num_blocks = [0] * num_seats
        self._may_draft = settings.num_speculative_tokens > 0
        self._one_each = np.ones(num_seats, np.int64)

    def take_in(self, batch: Batch) -> None:
        """Who sits down."""
        for started in batch.started:
            seat, params = started.seat, started.sampling_params
            self._token_ids[seat, : len(started.token_ids)] = started.token_ids
            self._num_known[seat] = len(started.token_ids)
            self._num_blocks[seat] = 0
            self.temperature[seat], self.top_p[seat], self.top_k[seat] = params.temperature, params.top_p, params.top_k
            self.seeds[seat] = params.seed % 2**64
            self.num_prompt_tokens[seat] = started.num_prompt_tokens
            self.min_p[seat] = params.min_p
            self.num_logprobs[seat] = -1 if params.num_logprobs is None else params.num_logprobs

    def append(self, seat: int, position: int, token_ids: Sequence[int]) -> None:
        """The host knows what was sampled for the seat at `position` and after it."""
        end = position + len(token_ids)
        self._token_ids[seat, position:end] = token_ids
        self._num_known[seat] = end

    def lay_out(self, batch: Batch, scored: Sequence[ScoredPart], step: HostStep) -> Samples:
        """Write which rows there are and what they read; padding reads and writes where nobody does.

        Logits are wanted of the samples' rows, then of those that are scored.
        """
        items = batch.scheduled
        num_requests = len(items)
        seat = np.fromiter(map(_SEAT, items), np.int64, num_requests)
        start = np.fromiter(map(_NUM_COMPUTED, items), np.int64, num_requests)
        if batch.num_decodes == num_requests and not self._may_draft:
            count = self._one_each[:num_requests]
        else:
            count = np.fromiter(map(_NUM_SCHEDULED, items), np.int64, num_requests)
        end = start + count
        cu_seqlens_q = step.part("cu_seqlens_q")
        end_row = count.cumsum()
        num_rows = int(end_row[-1]) if num_requests else 0
        cu_seqlens_q[0] = 0
        cu_seqlens_q[1 : num_requests + 1] = end_row
        cu_seqlens_q[num_requests + 1 :] = num_rows
        step.fill("seats", seat, padding=self.nobody)
        step.fill("seq_lens", end, padding=0)

        row_seat, position = seat, start
        if num_rows > num_requests:
            owner = np.arange(num_requests).repeat(count)
            row_seat = seat[owner]
            position = np.arange(num_rows) + (end - end_row)[owner]
        step.fill("row_seats", row_seat, padding=self.nobody)
        step.fill("positions", position, padding=0)
        step.fill("token_ids", self.token_ids(row_seat, position), padding=0)

        if num_rows == batch.num_decodes:  # a sample of each row
            rows, samples = np.arange(num_rows), Samples(seat, end - self.num_prompt_tokens[seat])
        else:
            rows, samples = self._samples(batch, seat, end, end_row, step)
        wanted = np.concatenate([rows, *(np.array(part.rows, np.int64) for part in scored)]) if scored else rows
        step.fill("logits_indices", wanted, padding=0)
        return samples

    def _samples(
        self,
        batch: Batch,
        seat: NDArray[np.int64],
        end: NDArray[np.int64],
        end_row: NDArray[np.int64],
        step: HostStep,
    ) -> tuple[NDArray[np.int64], Samples]:
        """Rows of tokens that are sampled, and how; writes the drafts that are among them."""
        items = batch.scheduled
        count = np.fromiter(map(_NUM_SAMPLES, items), np.int64, len(items))
        owner = np.arange(len(items)).repeat(count)
        before_end = count[owner] - (np.arange(len(owner)) - (count.cumsum() - count)[owner])
        rows, seats = end_row[owner] - before_end, seat[owner]
        indices = end[owner] - before_end + 1 - self.num_prompt_tokens[seats]
        if len(owner) == np.count_nonzero(count):
            return rows, Samples(seats, indices)
        number = count[owner] - before_end  # of the drafts that a row stands behind; the last of them is its token
        behind = {row: items[owner[row]].draft_token_ids[: number[row]] for row in number.nonzero()[0].tolist()}
        step.part("token_ids")[rows[list(behind)]] = [drafts[-1] for drafts in behind.values()]
        return rows, Samples(seats, indices, behind)

    def token_ids(self, seats: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32: the tokens at these places, ON_DEVICE for those that were sampled and are on their way."""
        is_known = positions < self._num_known[seats]
        if not is_known.any():  # as where all are streams
            return np.full(len(seats), ON_DEVICE, np.int32)
        return np.where(is_known, self._token_ids[seats, positions], ON_DEVICE)

    def write_sampling(self, seats: NDArray[np.int64], step: HostStep) -> None:
        """How the requests in these seats are sampled, into the parts for samples."""
        step.fill("sample_seats", seats, np.int64)
        step.fill_by_seat(self._by_seat.take(seats, axis=1))
        step.fill("seeds", self.seeds[seats], np.uint64)

    def write_new_blocks(self, items: Sequence[ScheduledRequest], step: HostStep) -> int:
        """What the batch's items add to block tables; how many entries."""
        places: list[int] = []
        blocks: list[int] = []
        for item in items:
            if item.new_block_ids:
                first = item.seat * self.max_num_blocks + self._num_blocks[item.seat]
                places += range(first, first + len(item.new_block_ids))
                blocks += item.new_block_ids
                self._num_blocks[item.seat] += len(item.new_block_ids)
        step.fill_new_blocks(places, blocks)
        return len(blocks)

    def apply_new_blocks(self, step: DeviceStep, number: int) -> None:
        """On the device, in the order of its stream."""
        places, blocks = step.new_blocks(number)
        self.block_tables.view(-1).index_copy_(0, places, blocks)

    def resolve(self, token_ids: Tensor, seats: Tensor) -> Tensor:
        """On the device: the tokens of a step, with what only the device knows filled in."""
        return torch.where(token_ids == ON_DEVICE, self.last_token_ids[seats], token_ids)
