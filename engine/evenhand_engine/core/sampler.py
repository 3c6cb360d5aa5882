"""Sampler: logits to token ids.

Stateless: token i of a request depends on its logits, its SamplingParams, its own tokens before it and (seed, i) alone, so
neither batching nor chunking nor preemption changes a seeded result. The drawing itself is the kernels' (`Kernels.draw`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.core.adjustments import MIN_TEMPERATURE, Adjustments
from evenhand_engine.core.followers import Mask
from evenhand_engine.core.token_logprobs import describe
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled, SamplingParams, TokenLogprobs
from evenhand_kernels.drawing import allowed_tokens
from evenhand_kernels.kernels import Draw, Kernels

_NONE: Mapping[int, Mask] = {}


_NO_TOKENS: NDArray[np.int32] = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row of logits is sampled.

    Attributes:
        index: the request's output tokens before this one.
        adjustments: what is done to the logits first; None: nothing.
        token_ids: int32, with `adjustments` all of the request's tokens before this one.
    """

    params: SamplingParams
    index: int
    adjustments: Adjustments | None = field(default=None, compare=False)
    token_ids: NDArray[np.int32] = field(default_factory=lambda: _NO_TOKENS, compare=False)


class Token(NamedTuple):
    """What one row of logits gave."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class _Seated(NamedTuple):
    params: SamplingParams
    num_prompt_tokens: int
    adjustments: Adjustments | None


class Seats:
    """How the request in each seat is sampled.

    Args:
        token_ids: the tokens of a seat that come before a position, drafts of the batch among them.
    """

    def __init__(self, token_ids: Callable[[int, int], NDArray[np.int32]]) -> None:
        self._token_ids = token_ids
        self._seated: dict[int, _Seated] = {}

    def prepare(self, batch: Batch) -> list[SamplingRow]:
        """Take in who sits where, and tell how each row of the batch's logits is sampled."""
        for started in batch.started:
            params = started.sampling_params
            self._seated[started.seat] = _Seated(params, started.num_prompt_tokens, Adjustments.of(params))
        rows = []
        for item in batch.scheduled:
            params, num_prompt_tokens, adjustments = self._seated[item.seat]
            end = item.num_computed_tokens + item.num_scheduled_tokens - num_prompt_tokens
            for index in range(end - item.num_samples + 1, end + 1):
                if adjustments is None:
                    rows.append(SamplingRow(params, index))
                else:
                    token_ids = self._token_ids(item.seat, num_prompt_tokens + index)
                    rows.append(SamplingRow(params, index, adjustments, token_ids))
        return rows


def accept(batch: Batch, tokens: Sequence[Token | None]) -> list[Sampled]:
    """The tokens of each item with samples, up to the first one whose successor was computed from a wrong draft.

    A row's token depends on its logits and the row's number alone, so a draft is right if it equals what was sampled:
    the outputs are those without drafts, for any temperature.
    """
    results, end = [], 0
    for item in batch.scheduled:
        start, end = end, end + item.num_samples
        taken: list[Token] = []
        for number, token in enumerate(tokens[start:end]):
            if token is None or (number > 0 and taken[-1].token_id != item.draft_token_ids[number - 1]):
                break
            taken.append(token)
        if item.num_samples:
            logprobs = tuple(token.logprobs for token in taken if token.logprobs is not None)
            results.append(Sampled(tuple(token.token_id for token in taken), logprobs))
    return results


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], kernels: Kernels, masks: Mapping[int, Mask] = _NONE
) -> list[Token | None]:
    """A token for each row of `logits`, float32 [num_rows, vocab_size], which may be overwritten.

    `masks`: by row; where there is none, all tokens may come.

    None for a row whose logits hold a NaN or an infinity, or of which no token may be drawn.
    """
    asked = [number for number, row in enumerate(rows) if row.params.num_logprobs is not None]
    own = _untouched(logits, asked, rows) if asked else logits
    for number, row in enumerate(rows):
        if row.adjustments is not None:
            adjusted = logits[number].numpy()
            if (mask := masks.get(number)) is not None:  # the draw knows it, but min_p must too
                adjusted[~allowed_tokens(mask, len(adjusted))] = -np.inf
            row.adjustments.apply(adjusted, row.token_ids, row.index)
    token_ids = kernels.draw(logits, [_draw(row, masks.get(number)) for number, row in enumerate(rows)])
    told = _told(kernels, own, asked, token_ids, rows) if asked else {}
    return [
        None if token_id is None else Token(token_id, told.get(number)) for number, token_id in enumerate(token_ids)
    ]


def _untouched(logits: Tensor, asked: Sequence[int], rows: Sequence[SamplingRow]) -> Tensor:
    """The logits of those rows as the model gave them, whatever is done to them for the draw."""
    is_changed = any(rows[number].adjustments is not None for number in asked)
    return logits[asked] if is_changed or len(asked) < len(rows) else logits


def _told(
    kernels: Kernels,
    logits: Tensor,
    asked: Sequence[int],
    token_ids: Sequence[int | None],
    rows: Sequence[SamplingRow],
) -> dict[int, TokenLogprobs]:
    """By row; `logits`: of those that asked. None where nothing was drawn."""
    drawn = [(place, number, i) for place, number in enumerate(asked) if (i := token_ids[number]) is not None]
    found = describe(
        kernels,
        logits if len(drawn) == len(asked) else logits[[place for place, _, _ in drawn]],
        [token_id for _, _, token_id in drawn],
        [rows[number].params.num_logprobs or 0 for _, number, _ in drawn],
    )
    return {number: one for (_, number, _), one in zip(drawn, found, strict=True)}


def _draw(row: SamplingRow, allowed: Mask | None) -> Draw:
    params = row.params
    temperature = 0.0 if params.temperature < MIN_TEMPERATURE else params.temperature
    return Draw(temperature, params.top_p, params.top_k, params.seed % 2**64, row.index, allowed)
