"""Two ways to one engine, by turns: what differs between them, on a machine whose own speed changes from minute to minute.

A slice loads the engine one way, waits until that is steady, counts the tokens that the *engine* computed in so many seconds, goes on
until whoever asked meanwhile has a first token, and ends when the engine is idle. Two slices, in random order, are a pair, and its ratio
is of tokens a minute or two apart. Of all pairs' ratios: the geometric mean, and Student's interval of 95 %.
"""

import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import mean, stdev

# Student's quantile 0.975 by degrees of freedom, from 1
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
FEWEST_PAIRS = 2


@dataclass(frozen=True)
class Slice:
    """One turn: tokens a second that the engine computed, the waits for a first token, and how many never got one."""

    tokens_per_s: float
    waits: list[float]
    num_unanswered: int


Turn = Callable[[], Awaitable[Slice]]


async def by_turns(
    first: Turn, second: Turn, num_pairs: int, max_seconds: float, rng: random.Random
) -> list[tuple[Slice, Slice]]:
    """Pairs of slices, (first, second), measured in random order: so many, or as many as begin within that time, but two at least."""
    pairs, began = list[tuple[Slice, Slice]](), time.monotonic()
    while len(pairs) < num_pairs and (len(pairs) < FEWEST_PAIRS or time.monotonic() - began < max_seconds):
        slices = {turn: await turn() for turn in rng.sample([first, second], 2)}
        pairs.append((slices[first], slices[second]))
    return pairs


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of at least two ratios, and the bounds of its interval of 95 %."""
    logs = [math.log(ratio) for ratio in ratios]
    quantile = _STUDENT[min(len(logs) - 1, len(_STUDENT)) - 1]
    middle, half = mean(logs), quantile * stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)
