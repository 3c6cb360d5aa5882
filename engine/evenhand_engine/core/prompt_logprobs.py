"""PromptLogprobs: log probabilities of prompts, collected chunk by chunk and told with the first output."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.core.sampler import token_logprobs
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import TokenLogprobs


@dataclass(slots=True)
class _Asked:
    num_top: int
    num_prompt_tokens: int
    told: list[TokenLogprobs] = field(default_factory=list)


class PromptLogprobs:
    """By seat. A row of a prompt tells how likely the prompt's next token is.

    Args:
        token_ids: the tokens of a seat that come before a position.
    """

    def __init__(self, token_ids: Callable[[int, int], NDArray[np.int32]]) -> None:
        self._token_ids = token_ids
        self._asked: dict[int, _Asked] = {}

    def rows(self, batch: Batch) -> list[int]:
        """Take in who sits where; rows of the batch's tokens whose logits `take` wants."""
        for started in batch.started:
            num_top = started.sampling_params.num_prompt_logprobs
            self._asked.pop(started.seat, None)
            if num_top is not None and len(started.token_ids) == started.num_prompt_tokens:  # else told before
                self._asked[started.seat] = _Asked(num_top, started.num_prompt_tokens)
        if not self._asked:
            return []
        rows: list[int] = []
        end = 0
        for item in batch.scheduled:
            end += item.num_scheduled_tokens
            if (asked := self._asked.get(item.seat)) is not None:
                first = end - item.num_scheduled_tokens
                rows += range(first, first + _num_rows(asked, item.num_computed_tokens, item.num_scheduled_tokens))
        return rows

    def take(self, batch: Batch, logits: Tensor, places: NDArray[np.intp]) -> dict[int, tuple[TokenLogprobs, ...]]:
        """By seat, what is told of prompts that the batch ends.

        Args:
            logits: float32 [num_rows, vocab_size].
            places: [len(rows)], which of these are those of `rows`.
        """
        ended, row = {}, 0
        for item in batch.scheduled if self._asked else ():
            if (asked := self._asked.get(item.seat)) is None:
                continue
            start = item.num_computed_tokens
            count = _num_rows(asked, start, item.num_scheduled_tokens)
            following = self._token_ids(item.seat, start + count + 1)[start + 1 :].tolist()
            asked.told += (
                token_logprobs(logits[places[row + number]], token_id, asked.num_top)
                for number, token_id in enumerate(following)
            )
            row += count
            if item.num_samples:
                ended[item.seat] = tuple(self._asked.pop(item.seat).told)
        return ended


def _num_rows(asked: _Asked, start: int, count: int) -> int:
    """Of the tokens [start, start + count), how many are followed by one of the prompt."""
    return max(0, min(start + count, asked.num_prompt_tokens - 1) - start)
