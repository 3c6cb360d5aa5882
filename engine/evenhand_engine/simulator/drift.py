"""Drift: the speed of the machine that steps were recorded on, which other work on it changes while they are.

A step time has no time in it, so a fit takes such changes for noise. Here they are taken out: steps of any shape that end
within a few seconds of each other are slowed alike.
"""

from collections.abc import Sequence

import numpy as np

from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.simulator.device import LinearStepTime, fit_step_time
from evenhand_engine.simulator.measures import FloatArray

_ROUNDS = 5
_SPAN = 1.0  # seconds


def fit_with_drift(
    shapes: Sequence[StepShape], seconds: FloatArray, ends: FloatArray
) -> tuple[LinearStepTime, FloatArray]:
    """The step time at the machine's middle speed, and its drift: how many times as long it took around each step.

    `ends`: when the steps ended, in seconds, in order. Drift is the median over the steps that end within a second of
    each, and is 1 in the middle of the time recorded; drift and step time are found in turn.

    Raises:
        ValueError: as `fit_step_time` does.
    """
    first, last = np.searchsorted(ends, ends - _SPAN), np.searchsorted(ends, ends + _SPAN, side="right")
    drift = np.ones_like(seconds)
    for _ in range(_ROUNDS):
        step_time = fit_step_time(shapes, (seconds / drift).tolist())
        ratios = seconds / np.array([step_time.seconds(shape) for shape in shapes])
        drift = np.array([np.median(ratios[i:j]) for i, j in zip(first, last, strict=True)])
        drift /= _median_over_time(drift, seconds)
    return step_time, drift


def _median_over_time(values: FloatArray, seconds: FloatArray) -> float:
    """The median of `values` that held for so many seconds each."""
    order = np.argsort(values)
    elapsed = np.cumsum(seconds[order])
    return float(values[order][np.searchsorted(elapsed, elapsed[-1] / 2)])
