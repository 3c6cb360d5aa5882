"""Staging: turns a Batch into a ModelInput through host arrays that live as long as the runner."""

from collections.abc import Sequence

import numpy as np
import torch

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.model.decoder import ModelInput
from evenhand_engine.scheduler.batch import ScheduledRequest
from evenhand_kernels.kernels import AttentionBatch


class Staging:
    """Owns the arrays; a ModelInput shares their memory and is valid until the next `fill`."""

    def __init__(self, settings: SchedulerSettings) -> None:
        num_tokens, num_seqs = settings.max_num_batched_tokens, settings.max_num_seqs
        self._block_size = settings.block_size
        self._input_ids = np.zeros(num_tokens, np.int32)
        self._positions = np.zeros(num_tokens, np.int32)
        self._slot_mapping = np.zeros(num_tokens, np.int32)
        self._block_table = np.zeros((num_seqs, -(-settings.max_model_len // settings.block_size)), np.int32)
        self._seq_lens = np.zeros(num_seqs, np.int32)
        self._cu_seqlens_q = np.zeros(num_seqs + 1, np.int32)

    def fill(self, scheduled: Sequence[ScheduledRequest], token_ids: Sequence[Sequence[int]]) -> ModelInput:
        """Lay out the step; `token_ids` are the scheduled tokens of each item."""
        end = 0
        for index, item in enumerate(scheduled):
            start, end = end, end + item.num_scheduled_tokens
            seq_len = item.num_computed_tokens + item.num_scheduled_tokens
            num_blocks = -(-seq_len // self._block_size)
            self._input_ids[start:end] = token_ids[index]
            self._positions[start:end] = np.arange(item.num_computed_tokens, seq_len)
            self._block_table[index, :num_blocks] = item.request.block_table[:num_blocks]
            self._seq_lens[index] = seq_len
            self._cu_seqlens_q[index + 1] = end
        positions, lens = self._positions[:end], np.diff(self._cu_seqlens_q[: len(scheduled) + 1])
        blocks = self._block_table[np.repeat(np.arange(len(scheduled)), lens), positions // self._block_size]
        self._slot_mapping[:end] = blocks * self._block_size + positions % self._block_size
        samples = [index for index, item in enumerate(scheduled) if item.samples]
        return ModelInput(
            input_ids=torch.from_numpy(self._input_ids[:end]),
            attention=AttentionBatch(
                positions=torch.from_numpy(positions),
                slot_mapping=torch.from_numpy(self._slot_mapping[:end]),
                block_table=torch.from_numpy(self._block_table[: len(scheduled)]),
                seq_lens=torch.from_numpy(self._seq_lens[: len(scheduled)]),
                cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: len(scheduled) + 1]),
            ),
            logits_indices=torch.from_numpy(self._cu_seqlens_q[1:][samples] - 1),
        )
