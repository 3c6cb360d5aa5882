"""`Kernels.draw` in numpy: the reference, and what serves where nothing can be compiled.

A counter-based generator (Philox) turns (seed, counter) into one uniform number, which picks a token by the inverse of the
cumulative distribution. That distribution is taken in the order of token ids, not of probabilities: there, a rounding
difference in the logits moves the borders between tokens by as little as itself, while two nearly equal tokens would swap
places in a sorted order.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.kernels import Draw

RUN = 256
"""Tokens whose probabilities are summed before one of them is looked for."""

SET = 16
"""Tokens of which only the most probable counts while the top_k-th is looked for."""


def draw_rows(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """See `Kernels.draw`."""
    logits = _masked(logits, draws)
    token_ids: list[int | None] = [None] * len(draws)
    drawn = []
    is_valid = logits.amax(dim=-1).isfinite().tolist() if draws else []
    for number, (draw, valid) in enumerate(zip(draws, is_valid, strict=True)):
        if valid and draw.temperature == 0:
            token_ids[number] = int(logits[number].numpy().argmax())  # torch's takes six times as long
        elif valid:
            drawn.append(number)
    if drawn:
        temperatures = torch.tensor([draws[number].temperature for number in drawn])
        probabilities = logits[drawn].div_(temperatures[:, None]).softmax(dim=-1).numpy()
        for number, row in zip(drawn, probabilities, strict=True):
            token_ids[number] = _draw_one(row, draws[number])
    return token_ids


def _masked(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """With -infinity for what may not come."""
    masks = {number: draw.allowed for number, draw in enumerate(draws) if draw.allowed is not None}
    if masks:
        logits = logits.clone()
    for number, mask in masks.items():
        logits[number].numpy()[~allowed_tokens(mask, logits.shape[1])] = -np.inf
    return logits


def allowed_tokens(mask: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """bool [vocab_size]: whether a token may come, by `Draw.allowed`."""
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


def _draw_one(probabilities: NDArray[np.float32], draw: Draw) -> int:
    uniform = _uniform(draw.seed, draw.counter)
    if draw.top_p >= 1 and not 0 < draw.top_k < len(probabilities):
        return _draw_of_all(probabilities, uniform)
    kept = _kept(probabilities, draw)
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


def _kept(probabilities: NDArray[np.float32], draw: Draw) -> NDArray[np.intp]:
    """The tokens that top_k, then top_p keep. What equals the least of them is kept too, whatever its place."""
    least = np.finfo(np.float32).smallest_subnormal
    if 0 < draw.top_k < len(probabilities):
        least = max(least, _least_of_top_k(probabilities, draw.top_k))
    kept = np.flatnonzero(probabilities >= least)
    if draw.top_p < 1:
        top = probabilities[kept]
        kept = kept[top >= _least_of_top_p(top, draw.top_p)]
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


def _uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) that depends on both arguments and on nothing else."""
    return (np.random.Philox(key=seed, counter=counter).random_raw() >> 11) * 2.0**-53
