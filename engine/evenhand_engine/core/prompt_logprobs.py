"""PromptLogprobs: log probabilities of prompts, collected chunk by chunk and told with the first output."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

from evenhand_engine.scheduler.batch import Batch, ScheduledRequest
from evenhand_engine.scheduler.request import TokenLogprobs


@dataclass(slots=True)
class _Asked:
    num_top: int
    prompt: "array[int]"
    told: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """The part of a prompt that a batch scores, whoever has its seat later.

    Attributes:
        rows: of the batch's tokens; each tells how likely the next token of the prompt is.
        token_ids: these next tokens.
        num_top: of how many of the likeliest tokens to tell beside each.
        number: the item's among the batch's with samples, if it ends the prompt; else None.
    """

    rows: range
    token_ids: list[int]
    num_top: int
    number: int | None
    _asked: _Asked

    def tell(self, logprobs: Iterable[TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
        """Those of its rows; returns the whole prompt's, but for its first token's. All parts before it have told theirs."""
        self._asked.told += logprobs
        return tuple(self._asked.told) if self.number is not None else ()


class PromptLogprobs:
    """By seat."""

    def __init__(self) -> None:
        self._asked: dict[int, _Asked] = {}

    def begin(self, batch: Batch) -> list[ScoredPart]:
        """Take in who sits where; the parts of prompts that the batch scores."""
        for started in batch.started:
            num_top = started.sampling_params.num_prompt_logprobs
            self._asked.pop(started.seat, None)
            if num_top is not None and len(started.token_ids) == started.num_prompt_tokens:  # else told before
                self._asked[started.seat] = _Asked(num_top, started.token_ids)
        parts: list[ScoredPart] = []
        if not self._asked:
            return parts
        end = number = 0
        for item in batch.scheduled:
            if (asked := self._asked.get(item.seat)) is not None:
                parts.append(_part(item, asked, end, number))
                if item.num_samples:
                    del self._asked[item.seat]
            end += item.num_scheduled_tokens
            number += item.num_samples > 0
        return parts


def _part(item: ScheduledRequest, asked: _Asked, first_row: int, number: int) -> ScoredPart:
    start = item.num_computed_tokens
    followers = asked.prompt[start + 1 : start + 1 + item.num_scheduled_tokens].tolist()  # the last token has none
    rows = range(first_row, first_row + len(followers))
    return ScoredPart(rows, followers, asked.num_top, number if item.num_samples else None, asked)
