"""The machine's drift: what is taken out of a recording is its speed over time, and not what its steps computed."""

import numpy as np
import pytest

from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.simulator.device import LinearStepTime, fit_step_time
from evenhand_engine.simulator.drift import fit_with_drift

TRUTH = LinearStepTime(0.02, per_prefill_token=2e-3, per_decode_token=1e-3, per_prefill_pair=1e-6)


def recording(*, slowed: bool) -> tuple[list[StepShape], np.ndarray, np.ndarray]:
    """Steps of any shape one after the other; `slowed`: the machine is 2.5 times as slow for every third span of 20 s."""
    rng = np.random.default_rng(4)
    shapes, seconds, now = [], [], 0.0
    for _ in range(1_500):
        prefill = int(rng.choice([0, 0, 0, 60, 200]))
        shape = StepShape(prefill, int(rng.integers(1, 30)), 0, 0, prefill * int(rng.integers(100, 1_500)))
        factor = 2.5 if slowed and int(now / 20) % 3 == 1 else 1.0
        shapes.append(shape)
        seconds.append(TRUTH.seconds(shape) * factor * rng.normal(1.0, 0.03))
        now += seconds[-1]
    return shapes, np.array(seconds), np.cumsum(seconds)


def test_a_machine_that_is_slowed_for_a_while_is_seen_through() -> None:
    shapes, seconds, ends = recording(slowed=True)
    step_time, drift = fit_with_drift(shapes, seconds, ends)
    for shape in (StepShape(0, 1, 0, 0), StepShape(0, 30, 0, 0), StepShape(200, 8, 0, 0, 200_000)):
        assert step_time.seconds(shape) == pytest.approx(TRUTH.seconds(shape), rel=0.05)
    middle = np.abs(ends % 20 - 10) < 7  # of a span
    slow = (ends // 20).astype(int) % 3 == 1
    assert np.median(drift[middle & slow]) == pytest.approx(2.5, rel=0.05)
    assert drift[middle & ~slow] == pytest.approx(1.0, abs=0.1)
    plain = fit_step_time(shapes, seconds.tolist())
    assert plain.seconds(StepShape(0, 8, 0, 0)) > 1.2 * TRUTH.seconds(StepShape(0, 8, 0, 0))


def test_a_steady_machine_has_no_drift() -> None:
    shapes, seconds, ends = recording(slowed=False)
    step_time, drift = fit_with_drift(shapes, seconds, ends)
    assert drift == pytest.approx(1.0, abs=0.1)
    assert step_time.per_prefill_pair == pytest.approx(1e-6, rel=0.05)
