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

from evenhand_engine.request import SamplingParams

MIN_TEMPERATURE = 1e-5
"""Below it sampling is greedy: the quotients would overflow, and the best token has all the probability anyway."""

LEAST_POSITIVE = np.finfo(np.float32).smallest_subnormal


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
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [number for number, row in enumerate(rows) if row.params.temperature >= MIN_TEMPERATURE]
    if drawn:
        temperatures = torch.tensor([rows[number].params.temperature for number in drawn])
        probabilities = (logits[drawn] / temperatures[:, None]).softmax(dim=-1).numpy()
        for number, row_probabilities in zip(drawn, probabilities, strict=True):
            token_ids[number] = _draw(row_probabilities, rows[number])
    return token_ids


def _draw(probabilities: NDArray[np.float32], row: SamplingRow) -> int:
    kept = np.flatnonzero(probabilities >= _least_kept(probabilities, row.params))
    cumulative = probabilities[kept].cumsum(dtype=np.float64)
    target = _uniform(row.params.seed, row.index) * cumulative[-1]
    position = np.searchsorted(cumulative, target, side="right")
    return int(kept[min(position, len(kept) - 1)])


def _least_kept(probabilities: NDArray[np.float32], params: SamplingParams) -> np.float32:
    """The least probability that top_k, then top_p keep. What equals it is kept too, whatever its place."""
    vocab_size = len(probabilities)
    least = LEAST_POSITIVE
    if 0 < params.top_k < vocab_size:
        least = max(least, np.partition(probabilities, vocab_size - params.top_k)[vocab_size - params.top_k])
    if params.top_p >= 1:
        return least
    top = probabilities[probabilities >= least]
    mass = top.sum(dtype=np.float64)
    # All tokens below this bound together have less than the mass that top_p leaves out: no need to sort them.
    bound = (1 - params.top_p) * mass / len(top)
    largest_first = -np.sort(-top[top >= bound])
    num_kept = np.searchsorted(largest_first.cumsum(dtype=np.float64), params.top_p * mass) + 1
    return largest_first[min(num_kept, len(largest_first)) - 1]  # type: ignore[no-any-return]


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on both arguments and on nothing else."""
    return (np.random.Philox(key=seed % 2**64, counter=index).random_raw() >> 11) * 2.0**-53
