"""Sampler: logits to token ids.

Stateless: token i of a request depends on its logits, its SamplingParams and (seed, i) alone, so neither batching nor
chunking nor preemption changes a seeded result. A counter-based generator (Philox) turns (seed, i) into one uniform
number, which picks a token by the inverse of the cumulative distribution. That distribution is taken in the order of
token ids, not of probabilities: there, a rounding difference in the logits moves the borders between tokens by as
little as itself, while two nearly equal tokens would swap places in a sorted order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Sampled, SamplingParams, TokenLogprobs

MIN_TEMPERATURE = 1e-5
"""Below it sampling is greedy: the quotients would overflow, and the best token has all the probability anyway."""

RUN = 256
"""Tokens whose probabilities are summed before one of them is looked for."""

SET = 16
"""Tokens of which only the most probable counts while the top_k-th is looked for."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row of logits is sampled; `index` counts the request's output tokens before this one."""

    params: SamplingParams
    index: int


class Token(NamedTuple):
    """What one row of logits gave."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Seats:
    """How the request in each seat is sampled."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[SamplingParams, int]] = {}  # by seat, with the length of the prompt

    def prepare(self, batch: Batch) -> list[SamplingRow]:
        """Take in who sits where, and tell how each row of the batch's logits is sampled."""
        for started in batch.started:
            self._requests[started.seat] = (started.sampling_params, started.num_prompt_tokens)
        rows = []
        for item in batch.scheduled:
            params, num_prompt_tokens = self._requests[item.seat]
            end = item.num_computed_tokens + item.num_scheduled_tokens - num_prompt_tokens
            rows += [SamplingRow(params, index) for index in range(end - item.num_samples + 1, end + 1)]
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


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Token | None]:
    """A token for each row of `logits`, float32 [num_rows, vocab_size], which may be overwritten.

    None for a row whose logits hold a NaN or an infinity, or of which no token may be drawn.
    """
    told = {
        number: torch.log_softmax(logits[number], dim=-1).numpy()
        for number, row in enumerate(rows)
        if row.params.num_logprobs is not None
    }
    for number, row in enumerate(rows):
        if row.index < row.params.min_tokens and row.params.stop_token_ids:
            logits[number, list(row.params.stop_token_ids)] = -torch.inf
    is_valid = logits.amax(dim=-1).isfinite().tolist() if rows else []
    token_ids = [0] * len(rows)
    drawn = []
    for number, row in enumerate(rows):
        if not is_valid[number]:
            continue
        if row.params.temperature < MIN_TEMPERATURE:
            token_ids[number] = int(logits[number].numpy().argmax())  # torch's takes six times as long
        else:
            drawn.append(number)
    if drawn:
        temperatures = torch.tensor([rows[number].params.temperature for number in drawn])
        probabilities = logits[drawn].div_(temperatures[:, None]).softmax(dim=-1).numpy()
        for number, row_probabilities in zip(drawn, probabilities, strict=True):
            token_ids[number] = _draw(row_probabilities, rows[number])
    return [
        Token(token_ids[number], _logprobs(told.get(number), token_ids[number], row.params)) if valid else None
        for number, (row, valid) in enumerate(zip(rows, is_valid, strict=True))
    ]


def _logprobs(logprobs: NDArray[np.float32] | None, token_id: int, params: SamplingParams) -> TokenLogprobs | None:
    if logprobs is None:
        return None
    num_top = min(params.num_logprobs or 0, len(logprobs))
    top = np.argpartition(-logprobs, num_top - 1)[:num_top] if num_top else np.empty(0, np.intp)
    top = top[np.lexsort((top, -logprobs[top]))]
    return TokenLogprobs(
        logprob=float(logprobs[token_id]),
        rank=int((logprobs > logprobs[token_id]).sum()) + 1,
        top_token_ids=tuple(top.tolist()),
        top_logprobs=tuple(logprobs[top].tolist()),
    )


def _draw(probabilities: NDArray[np.float32], row: SamplingRow) -> int:
    uniform = _uniform(row.params.seed, row.index)
    if row.params.top_p >= 1 and not 0 < row.params.top_k < len(probabilities):
        return _draw_of_all(probabilities, uniform)
    kept = _kept(probabilities, row.params)
    cumulative = probabilities[kept].cumsum(dtype=np.float64)
    return int(kept[_place(cumulative, uniform * cumulative[-1])])


def _draw_of_all(probabilities: NDArray[np.float32], uniform: float) -> int:
    """Sums of runs of tokens tell in which run the token is; only that one is accumulated token by token."""
    runs = np.add.reduceat(probabilities, np.arange(0, len(probabilities), RUN), dtype=np.float64).cumsum()
    target = uniform * runs[-1]
    run = _place(runs, target)
    tokens = probabilities[run * RUN : (run + 1) * RUN].cumsum(dtype=np.float64)
    return run * RUN + _place(tokens, target - (runs[run - 1] if run else 0))


def _place(cumulative: NDArray[np.float64], target: float) -> int:
    """The first place beyond the target; the last that adds something, if rounding carried the target past all."""
    return int(min(cumulative.searchsorted(target, side="right"), cumulative.searchsorted(cumulative[-1])))


def _kept(probabilities: NDArray[np.float32], params: SamplingParams) -> NDArray[np.intp]:
    """The tokens that top_k, then top_p keep. What equals the least of them is kept too, whatever its place."""
    least = np.finfo(np.float32).smallest_subnormal
    if 0 < params.top_k < len(probabilities):
        least = max(least, _least_of_top_k(probabilities, params.top_k))
    kept = np.flatnonzero(probabilities >= least)
    if params.top_p < 1:
        top = probabilities[kept]
        kept = kept[top >= _least_of_top_p(top, params.top_p)]
    return kept


def _least_of_top_k(probabilities: NDArray[np.float32], top_k: int) -> np.float32:
    """The largest of each of many sets: the top_k-th of these is a lower bound that leaves little to sort."""
    maxima = probabilities[: len(probabilities) // SET * SET].reshape(SET, -1).max(axis=0)
    candidates = probabilities
    if top_k <= len(maxima):
        candidates = probabilities[probabilities >= np.partition(maxima, -top_k)[-top_k]]
    return np.partition(candidates, -top_k)[-top_k]  # type: ignore[no-any-return]


def _least_of_top_p(probabilities: NDArray[np.float32], top_p: float) -> np.float32:
    """All tokens below a certain bound together have less than the mass that top_p leaves out: no need to sort them."""
    mass = probabilities.sum(dtype=np.float64)
    bound = (1 - top_p) * mass / len(probabilities)
    largest_first = -np.sort(-probabilities[probabilities >= min(bound, probabilities.max())])
    num_kept = largest_first.cumsum(dtype=np.float64).searchsorted(top_p * mass) + 1
    return largest_first[min(num_kept, len(largest_first)) - 1]  # type: ignore[no-any-return]


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on both arguments and on nothing else."""
    return (np.random.Philox(key=seed % 2**64, counter=index).random_raw() >> 11) * 2.0**-53
