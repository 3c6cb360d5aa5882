"""DeviceSampler: tokens from logits without leaving the device; the launchers of the sampling kernels.

Which rows want what is data on the device that the caller keeps: no launch depends on a value, so a step's sampling can be
recorded in a graph and asked for before the step before is known.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from evenhand_kernels.cuda import variants
from evenhand_kernels.device import Device

ADJUST_PIECES = 8
"""Blocks that share a row of the vocabulary."""


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row of logits is sampled, on the device; the parameters' meaning is that of the engine's SamplingParams.

    Attributes:
        temperature, top_p, min_p: float32 [num_rows]. Below 1e-5 a temperature means the best token; top_p 1, min_p 0: off.
        top_k: int32 [num_rows]; 0: off.
        seeds, indices: int64 [num_rows]; a row's draw depends on these two alone. `indices` counts output tokens so far.
        seats: int32 [num_rows], the row of `token_counts` of each request, or -1.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seeds: Tensor
    indices: Tensor
    seats: Tensor


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Masks, biases and penalties of those rows that have any: `num_adjusted` of them.

    Attributes:
        rows: int32 [num_adjusted], rows of the logits.
        adjusted_row: int32 [num_rows], for each row of the logits its place in `rows`, or -1.
        seats: int32 [num_adjusted], rows of token_counts; -1: no penalties.
        repetition, frequency, presence: float32 [num_adjusted]; 1, 0 and 0: off.
        allowed: int32 [num_masks, ceil(vocab_size / 32)], bit t % 32 of word t // 32 allows token t; None: no masks.
        masks: int32 [num_adjusted], rows of `allowed`, or -1.
        bias_offsets: int32 [num_adjusted + 1], where the biases of each row begin in the next two; None: no biases.
        bias_tokens: int32; no token twice in a row.
        bias_values: float32, added to the logits; -inf forbids the token.
        draft_offsets: int32 [num_adjusted + 1], where the outputs of each row that are not counted yet begin in
            `draft_tokens`, int32: drafts that the row stands behind; None: there are none.
    """

    rows: Tensor
    adjusted_row: Tensor
    seats: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    allowed: Tensor | None = None
    masks: Tensor | None = None
    bias_offsets: Tensor | None = None
    bias_tokens: Tensor | None = None
    bias_values: Tensor | None = None
    draft_offsets: Tensor | None = None
    draft_tokens: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """By the model's own distribution, before temperature, masks and penalties.

    Attributes:
        sampled: float32 [num_rows], of the sampled tokens.
        top_ids, top: int32 and float32 [num_rows, num_top], the most probable tokens, best first.
    """

    sampled: Tensor
    top_ids: Tensor
    top: Tensor


class DeviceSampler:
    """Samples rows of logits [num_rows, vocab_size], bfloat16, float16 or float32, contiguous."""

    def __init__(
        self,
        device: Device,
        logits_dtype: torch.dtype,
        vocab_size: int,
        *,
        num_penalty_seats: int = 0,
        num_threads: int = variants.SAMPLING_THREADS,
    ) -> None:
        """`num_penalty_seats` requests can have penalties at a time; each takes 4 * vocab_size bytes."""
        self.vocab_size = vocab_size
        self._device = device
        self._counts = (
            torch.zeros(num_penalty_seats, vocab_size, dtype=torch.int32, device=device.torch_device)
            if num_penalty_seats
            else None
        )
        self._sample = device.load(variants.sample(logits_dtype, num_threads))
        self._adjust = device.load(variants.adjust(logits_dtype))
        self._log_probabilities = device.load(variants.log_probabilities(logits_dtype, num_threads))
        self._count_tokens = device.load(variants.count_tokens())

    def count_tokens(self, seats: Tensor, token_ids: Tensor, offsets: Tensor, num_prompt: Tensor) -> None:
        """Make the counts of penalised requests anew, when they take their seats.

        Args:
            seats: int32 [num_requests]; from now on these requests'.
            token_ids: int32, the tokens of all of them, one request after the other.
            offsets: int32 [num_requests + 1], where each request's begin.
            num_prompt: int32 [num_requests], how many of them are its prompt.
        """
        self._count_tokens(
            len(seats),
            seats=seats,
            token_ids=token_ids,
            offsets=offsets,
            num_prompt=num_prompt,
            token_counts=self._counts,
            vocab_size=self.vocab_size,
        )

    def count_outputs(self, seats: Tensor, token_ids: Tensor) -> None:
        """Count one more output token of each of these seats, both int64 [num_tokens]; for rows sampled without a seat."""
        assert self._counts is not None
        self._counts.view(-1).index_add_(
            0, seats * self.vocab_size + token_ids, torch.ones_like(token_ids, dtype=torch.int32)
        )

    def sample(self, logits: Tensor, rows: SamplingRows, adjustments: Adjustments | None = None) -> Tensor:
        """int32 [num_rows], a token for each row; counted at once for those with a seat. `logits` stay as they are.

        -1 for a row that holds a NaN or an infinity, or allows no token.
        """
        adjusted = None if adjustments is None else self.adjusted(logits, adjustments)
        token_ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        self._sample(
            len(logits),
            logits=logits,
            adjusted=adjusted,
            adjusted_row=None if adjustments is None else adjustments.adjusted_row,
            **_arguments(rows, _ROWS),
            token_counts=self._counts,
            token_ids=token_ids,
            vocab_size=self.vocab_size,
        )
        return token_ids

    def log_probabilities(self, logits: Tensor, token_ids: Tensor, num_top: int) -> LogProbabilities:
        """Of the sampled `token_ids`, int32 [num_rows], and of the `num_top` most probable tokens of each row."""
        num_top = min(num_top, self.vocab_size)
        sampled = torch.empty(len(logits), device=logits.device)
        top_ids = torch.empty(len(logits), num_top, dtype=torch.int32, device=logits.device)
        top = torch.empty(len(logits), num_top, device=logits.device)
        self._log_probabilities(
            len(logits),
            logits=logits,
            token_ids=token_ids,
            sampled=sampled,
            top_ids=top_ids,
            top=top,
            num_top=num_top,
            vocab_size=self.vocab_size,
        )
        return LogProbabilities(sampled, top_ids, top)

    def adjusted(self, logits: Tensor, adjustments: Adjustments) -> Tensor:
        """float32 [num_adjusted, vocab_size], the logits that the adjusted rows are sampled from."""
        adjusted = torch.empty(len(adjustments.rows), self.vocab_size, device=logits.device)
        self._adjust(
            (len(adjustments.rows), ADJUST_PIECES),
            logits=logits,
            **_arguments(adjustments, _ADJUSTMENTS),
            token_counts=self._counts,
            adjusted=adjusted,
            vocab_size=self.vocab_size,
        )
        return adjusted


_ROWS = tuple(field.name for field in fields(SamplingRows))
_ADJUSTMENTS = tuple(field.name for field in fields(Adjustments) if field.name != "adjusted_row")


def _arguments(record: SamplingRows | Adjustments, names: Iterable[str]) -> dict[str, Tensor | None]:
    """Fields of a record, which are named as the kernel's arguments are."""
    return {name: getattr(record, name) for name in names}
