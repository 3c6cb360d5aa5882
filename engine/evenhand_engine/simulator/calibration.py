"""Calibration: a device's step time from a run of which only each request's first and last token are known.

A simulation tells which steps a request took part in, and what they computed; the time between its first and its last
token, as measured, is the sum of these steps' times, which is linear in the coefficients sought. Since the simulated
schedule depends on them, simulation and fit are repeated.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from evenhand_engine.simulator.device import Device, LinearStepTime, non_negative_least_squares
from evenhand_engine.simulator.measures import RequestRecord
from evenhand_engine.simulator.simulation import Run


def calibrate(
    device: Device, simulate: Callable[[Device], Run], measured: Sequence[RequestRecord], rounds: int = 8
) -> Device:
    """`device` with the one linear step time under which `simulate` finishes requests closest to `measured`.

    `measured` are the records of the same trace in the same order, all served. A round's fit can be a little worse than
    the one before, because the schedule moves with it: the best of all rounds is returned.
    """
    candidates: list[tuple[float, Device]] = []
    run = simulate(device)
    for _ in range(rounds):
        device = replace(device, small_step=_fit(run, measured), large_step=None)
        run = simulate(device)
        candidates.append((mean_finish_error(run.records, measured), device))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def mean_finish_error(simulated: Sequence[RequestRecord], measured: Sequence[RequestRecord]) -> float:
    """Mean distance in seconds between a request's simulated and measured finish."""
    pairs = [
        abs(ours.finish_time - real.finish_time)
        for ours, real in zip(simulated, measured, strict=True)
        if ours.finish_time is not None and real.finish_time is not None
    ]
    return sum(pairs) / len(pairs)


def _fit(run: Run, measured: Sequence[RequestRecord]) -> LinearStepTime:
    steps = run.steps
    shapes = np.array(
        [(1, s.num_prefill_tokens, s.num_decode_tokens, s.decode_context) for s in steps.shapes], dtype=np.float64
    )
    until = np.vstack([np.zeros(shapes.shape[1]), np.cumsum(shapes, axis=0)])  # [steps + 1, features]
    ends = np.frombuffer(steps.starts) + np.frombuffer(steps.seconds)
    idle = ends - np.cumsum(np.frombuffer(steps.seconds))  # seconds without a step, until each step's end
    rows, seconds = [], []
    for simulated, real in zip(run.records, measured, strict=True):
        if simulated.first_token_time is None or simulated.finish_time is None:
            continue
        assert real.first_token_time is not None and real.finish_time is not None
        first, last = np.searchsorted(ends, (simulated.first_token_time - 1e-9, simulated.finish_time - 1e-9))
        rows += [until[last + 1] - until[first + 1], until[last + 1]]
        seconds += [real.finish_time - real.first_token_time, real.finish_time - idle[last]]
    intercept, prefill, decode, context = non_negative_least_squares(np.array(rows), np.array(seconds))
    return LinearStepTime(intercept, per_prefill_token=prefill, per_decode_token=decode, per_decode_context=context)
