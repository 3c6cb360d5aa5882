"""Step times: the published check values, and fits that find the coefficients a run was made with."""

import numpy as np
import pytest

from evenhand_engine.scheduler.step_time import StepShape
from evenhand_engine.simulator.calibration import calibrate
from evenhand_engine.simulator.device import DEVICES, Device, LinearStepTime, fit_step_time
from evenhand_engine.simulator.published import FirstComeFirstServed, PublishedServer
from evenhand_engine.simulator.simulation import Run, Simulation
from evenhand_engine.simulator.traces import TraceRequest


@pytest.mark.parametrize(
    ("shape", "milliseconds"),
    [(StepShape(0, 20, 0, 20_000), 19.06), (StepShape(512, 0, 0, 0), 56.56), (StepShape(2_048, 0, 0, 0), 201.25)],
)
def test_the_h100_gives_the_published_values(shape: StepShape, milliseconds: float) -> None:
    assert DEVICES["h100-8b"].seconds(shape) * 1_000 == pytest.approx(milliseconds, abs=0.01)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_preset_takes_longer_for_more(device: Device) -> None:
    decodes, longer, chunk = (
        device.seconds(shape)
        for shape in (StepShape(0, 8, 0, 800), StepShape(0, 8, 0, 8_000), StepShape(64, 8, 0, 800))
    )
    assert 0.001 < decodes <= longer < 1.0
    assert decodes < chunk < 1.0
    assert device.max_num_batched_tokens <= device.num_kv_tokens


def random_shapes(count: int) -> list[StepShape]:
    rng = np.random.default_rng(7)
    return [StepShape(*(int(n) for n in rng.integers(0, (500, 60, 3_000, 30_000)))) for _ in range(count)]


def test_a_fit_finds_the_coefficients_through_noise() -> None:
    truth = LinearStepTime(0.02, 0, 2e-4, 1e-4, 4e-7, 1e-6)
    noise = np.random.default_rng(8).normal(1.0, 0.01, 400)
    shapes = random_shapes(400)
    fitted = fit_step_time(shapes, [truth.seconds(s) * n for s, n in zip(shapes, noise, strict=True)])
    for shape in random_shapes(20):
        assert fitted.seconds(shape) == pytest.approx(truth.seconds(shape), rel=0.02)


def test_no_coefficient_is_negative() -> None:
    shapes = random_shapes(100)
    seconds = [1.0 + 0.001 * shape.num_prefill_tokens - 1e-6 * shape.decode_context for shape in shapes]
    fitted = fit_step_time(shapes, seconds)
    assert fitted.per_decode_context == 0.0
    assert fitted.per_prefill_token == pytest.approx(0.001, rel=0.1)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 steps"):
        fit_step_time(random_shapes(7), [1.0] * 7)
    with pytest.raises(ValueError, match="10 shapes, 9 times"):
        fit_step_time(random_shapes(10), [1.0] * 9)


def test_a_device_is_recovered_from_first_and_last_tokens_alone() -> None:
    rng = np.random.default_rng(9)
    trace = [
        TraceRequest("a", float(t), int(rng.integers(10, 800)), int(rng.integers(10, 300)))
        for t in np.cumsum(rng.exponential(0.4, 300))
    ]

    def simulate(device: Device) -> Run:
        server = PublishedServer(FirstComeFirstServed(), device.num_kv_tokens)
        return Simulation(server, device, trace, max_model_len=4_096, lengths_known=True).run()

    truth = Device("truth", 10_000, LinearStepTime(0.03, 0, 2e-4, 2e-4, 0, 1e-6))
    guess = Device("guess", 10_000, LinearStepTime(0.02, 0, 3e-4, 3e-4, 0, 1e-6))
    found = calibrate(guess, simulate, simulate(truth).records).small_step
    assert found.intercept == pytest.approx(0.03, rel=0.05)
    assert found.per_prefill_token == pytest.approx(2e-4, rel=0.1)
