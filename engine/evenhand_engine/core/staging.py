"""Staging: what the runner knows of each seat, and each batch laid out for the model, in arrays that live as long as it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.model.decoder import ModelInput
from evenhand_engine.scheduler.batch import Batch
from evenhand_kernels.kernels import AttentionBatch, Kernels

_FEW = 4  # streams, whose numbers are written one by one


@dataclass(frozen=True, slots=True)
class _Laid:
    """A step in which each request has one row. Another one of this shape differs in what its arrays hold."""

    shape: tuple[object, ...]
    block_table: NDArray[np.int32]
    model_input: ModelInput


class Staging:
    """Tokens and block table of each seat, and the arrays of one step.

    A ModelInput shares memory with these arrays and is valid until the next `fill`.
    """

    def __init__(self, settings: SchedulerSettings, kernels: Kernels) -> None:
        """`kernels` plan the attention of each step."""
        num_tokens, num_seats = settings.max_num_batched_tokens, settings.max_num_seqs
        max_num_blocks = -(-settings.max_model_len // settings.block_size)
        self._block_size = settings.block_size
        self._plan, self._torch_device = kernels.plan, kernels.torch_device
        self._token_ids = np.zeros((num_seats, settings.max_model_len + 1), np.int32)
        self._block_tables = np.zeros((num_seats, max_num_blocks), np.int32)
        self._num_blocks = [0] * num_seats
        self._input_ids = np.zeros(num_tokens, np.int32)
        self._positions = np.zeros(num_tokens, np.int32)
        self._slot_mapping = np.zeros(num_tokens, np.int32)
        self._seq_lens = np.zeros(num_seats, np.int32)
        self._cu_seqlens_q = np.zeros(num_seats + 1, np.int32)
        self._one_each = np.arange(num_seats + 1, dtype=np.int32)  # instead, where each request has one row
        self._last: _Laid | None = None

    def fill(self, batch: Batch, more_rows: Sequence[int] = ()) -> ModelInput:
        """Take in what the batch tells of its seats, and lay out its step.

        The result may be that of the last step, of the same shape: on the CPU plans share the memory of what they are made of.
        `more_rows`: of its tokens, whose logits are wanted too; those of all rows come in the order of the rows.
        """
        self._take_in(batch)
        items = batch.scheduled
        is_of_streams = not more_rows and all(item.num_scheduled_tokens == item.num_samples == 1 for item in items)
        if is_of_streams and len(items) <= _FEW:
            return self._fill_one_by_one(batch)
        seats = np.array([item.seat for item in items])
        starts = np.array([item.num_computed_tokens for item in items])
        positions = self._positions[: batch.num_tokens]
        if is_of_streams:
            counts, owners, cu_seqlens_q = np.array([1]), seats, self._one_each[: len(items) + 1]
            sampled, positions[:] = self._one_each[: len(items)], starts
        else:
            counts = np.array([item.num_scheduled_tokens for item in items])
            owners, cu_seqlens_q = np.repeat(seats, counts), self._cu_seqlens_q[: len(items) + 1]
            ends = np.cumsum(counts, out=cu_seqlens_q[1:])
            positions[:] = np.arange(len(positions)) + np.repeat(starts + counts - ends, counts)
            sampled = _merged(_last_of_each(ends, np.array([item.num_samples for item in items])), more_rows)
        self._input_ids[: len(positions)] = self._token_ids[owners, positions]
        blocks, offsets = np.divmod(positions, self._block_size)
        self._slot_mapping[: len(positions)] = self._block_tables[owners, blocks] * self._block_size + offsets
        seq_lens = np.add(starts, counts, out=self._seq_lens[: len(items)])
        block_table = self._block_tables[seats, : -(-int(seq_lens.max()) // self._block_size)]
        shape = (batch.num_decodes, block_table.shape)
        if is_of_streams and (last := self._last) is not None and last.shape == shape:
            last.block_table[:] = block_table
            return last.model_input
        return self._model_input(batch, block_table, cu_seqlens_q, sampled, shape if is_of_streams else None)

    def _fill_one_by_one(self, batch: Batch) -> ModelInput:
        """A token for each of few streams. Weights have gone through the caches since the last step, and what numpy has for many
        numbers would have to be read into them again."""
        size, num_blocks = self._block_size, 0
        for row, item in enumerate(batch.scheduled):
            seat, position = item.seat, item.num_computed_tokens
            block, offset = divmod(position, size)
            self._positions[row], self._seq_lens[row] = position, position + 1
            self._input_ids[row] = self._token_ids[seat, position]
            self._slot_mapping[row] = self._block_tables[seat, block] * size + offset
            num_blocks = max(num_blocks, block + 1)
        seats = [item.seat for item in batch.scheduled]
        shape, has_new_blocks = (batch.num_decodes, num_blocks, seats), any(i.new_block_ids for i in batch.scheduled)
        if (last := self._last) is not None and last.shape == shape and not has_new_blocks:
            return last.model_input
        block_table, one_each = self._block_tables[seats, :num_blocks], self._one_each
        return self._model_input(batch, block_table, one_each[: len(seats) + 1], one_each[: len(seats)], shape)

    def _model_input(
        self,
        batch: Batch,
        block_table: NDArray[np.int32],
        cu_seqlens_q: NDArray[np.int32],
        sampled: NDArray[np.int32],
        shape: tuple[object, ...] | None,
    ) -> ModelInput:
        """Of what the arrays hold. `shape`: what a later step has in common with this one if it is to have the same; None: none may."""
        num_rows, num_requests = batch.num_tokens, len(batch.scheduled)
        attention = AttentionBatch(
            positions=torch.from_numpy(self._positions[:num_rows]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:num_rows]),
            block_table=torch.from_numpy(block_table),
            seq_lens=torch.from_numpy(self._seq_lens[:num_requests]),
            cu_seqlens_q=torch.from_numpy(cu_seqlens_q),
            num_decodes=batch.num_decodes,
        )
        model_input = ModelInput(
            input_ids=torch.from_numpy(self._input_ids[:num_rows]).to(self._torch_device),
            plan=self._plan(attention),
            logits_indices=torch.from_numpy(sampled).to(self._torch_device),
        )
        is_shared = self._torch_device.type == "cpu"
        self._last = _Laid(shape, block_table, model_input) if shape is not None and is_shared else None
        return model_input

    def token_ids(self, seat: int, end: int) -> NDArray[np.int32]:
        """The seat's tokens before position `end`; a view."""
        return self._token_ids[seat, :end]

    def append(self, seat: int, position: int, token_ids: tuple[int, ...]) -> None:
        """Note what was sampled for the seat at `position` and after it."""
        self._token_ids[seat, position : position + len(token_ids)] = token_ids

    def _take_in(self, batch: Batch) -> None:
        for started in batch.started:
            self._token_ids[started.seat, : len(started.token_ids)] = started.token_ids
            self._num_blocks[started.seat] = 0
        for item in batch.scheduled:
            seat = item.seat
            if item.new_block_ids:
                start, end = self._num_blocks[seat], self._num_blocks[seat] + len(item.new_block_ids)
                self._block_tables[seat, start:end] = item.new_block_ids
                self._num_blocks[seat] = end
            if item.draft_token_ids:
                end = item.num_computed_tokens + item.num_scheduled_tokens
                self._token_ids[seat, end - len(item.draft_token_ids) : end] = item.draft_token_ids


def _last_of_each(ends: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """The last `counts[i]` rows before `ends[i]`, for each i."""
    firsts = np.repeat(ends - np.cumsum(counts), counts)
    return (firsts + np.arange(len(firsts))).astype(np.int32)


def _merged(rows: NDArray[np.int32], more_rows: Sequence[int]) -> NDArray[np.int32]:
    """In ascending order, as kernels take them."""
    return np.sort(np.concatenate((rows, np.array(more_rows, np.int32)))) if more_rows else rows
