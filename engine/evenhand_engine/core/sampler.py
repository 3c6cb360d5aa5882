"""Sampler: logits to token ids.

Stateless: token i of a request depends on its logits, its SamplingParams and (seed, i) alone, so neither batching nor
chunking nor preemption changes a seeded result. A counter-based generator (Philox) turns (seed, i) into one uniform
number, which picks a token by the inverse of the cumulative distribution. That distribution is taken in the order of
token ids, not of probabilities: there, a rounding difference in the logits moves the borders between tokens by as
little as itself, while two nearly equal tokens would swap places in a sorted order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.scheduler.request import SamplingParams

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


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token id for each row of `logits`, float32 [num_rows, vocab_size], which may be overwritten."""
    for number, row in enumerate(rows):
        if row.index < row.params.min_tokens and row.params.stop_token_ids:
            logits[number, list(row.params.stop_token_ids)] = -torch.inf
    token_ids = [0] * len(rows)
    drawn = []
    for number, row in enumerate(rows):
        if row.params.temperature < MIN_TEMPERATURE:
            token_ids[number] = int(logits[number].numpy().argmax())  # torch's takes six times as long
        else:
            drawn.append(number)
    if drawn:
        temperatures = torch.tensor([rows[number].params.temperature for number in drawn])
        probabilities = logits[drawn].div_(temperatures[:, None]).softmax(dim=-1).numpy()
        for number, row_probabilities in zip(drawn, probabilities, strict=True):
            token_ids[number] = _draw(row_probabilities, rows[number])
    return token_ids


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
