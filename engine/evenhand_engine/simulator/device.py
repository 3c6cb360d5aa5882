"""Device: how long a modelled machine takes for one step, and how much KV memory it has.

A step's time is linear in what the step computes, which fits measured engines well (Niyama, FairBatching); above some
number of tokens the slopes change, because the machine is then bound by arithmetic instead of memory.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from evenhand_engine.scheduler.step_time import FEWEST_STEPS, StepShape

_FIT_ROUNDS = 5
_SHORTEST_STEP = 1e-6  # seconds; the clock shows no less


@dataclass(frozen=True, slots=True)
class LinearStepTime:
    """Seconds of a step: `intercept`, plus a coefficient for each token, each prefill token, and so on."""

    intercept: float
    per_token: float = 0.0
    per_prefill_token: float = 0.0
    per_decode_token: float = 0.0
    per_prefill_context: float = 0.0
    per_decode_context: float = 0.0
    per_prefill_pair: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        return (
            self.intercept
            + self.per_token * (shape.num_prefill_tokens + shape.num_decode_tokens)
            + self.per_prefill_token * shape.num_prefill_tokens
            + self.per_decode_token * shape.num_decode_tokens
            + self.per_prefill_context * shape.prefill_context
            + self.per_decode_context * shape.decode_context
            + self.per_prefill_pair * shape.prefill_pairs
        )


@dataclass(frozen=True, slots=True)
class Device:
    """A machine with one model on it.

    Attributes:
        num_kv_tokens: tokens that its KV cache holds.
        max_num_batched_tokens, max_num_seqs: what the engine is started with on such a machine.
        small_step: step time up to `threshold` tokens.
        large_step: step time beyond; None: `small_step` holds for any size.
    """

    name: str
    num_kv_tokens: int
    small_step: LinearStepTime
    large_step: LinearStepTime | None = None
    threshold: int = 0
    max_num_batched_tokens: int = 2_048
    max_num_seqs: int = 256

    def seconds(self, shape: StepShape) -> float:
        """How long a step of this shape takes."""
        if self.large_step is not None and shape.num_prefill_tokens + shape.num_decode_tokens > self.threshold:
            return self.large_step.seconds(shape)
        return self.small_step.seconds(shape)


def perturbed(device: Device, seed: int, spread: float = 0.01) -> Device:
    """`device` with each coefficient of its small step off by up to `spread`. Seed 0 is the device itself.

    A scheduler's run is chaotic: shift one admission and all later ones differ. What is claimed of a run should hold for
    the runs around it.
    """
    coefficients = np.array(astuple(device.small_step))
    factors = 1.0 + np.random.default_rng(seed).uniform(-spread, spread, len(coefficients)) * (seed != 0)
    return replace(device, small_step=LinearStepTime(*(coefficients * factors).tolist()))


def fit_step_time(shapes: Sequence[StepShape], seconds: Sequence[float]) -> LinearStepTime:
    """Least-squares fit of a recorded run; coefficients that come out negative are left out and the rest fitted again.

    What is made small is the relative error, since a long step varies by more than a short one: each step is weighted by
    the time that the round before predicted for it (iteratively reweighted least squares).

    Raises:
        ValueError: fewer than `FEWEST_STEPS` steps, or lengths that differ.
    """
    if len(shapes) != len(seconds) or len(shapes) < FEWEST_STEPS:
        raise ValueError(
            f"a fit needs at least {FEWEST_STEPS} steps with their times; got {len(shapes)} shapes, {len(seconds)} times"
        )
    matrix, measured = np.array([_features(shape) for shape in shapes]), np.asarray(seconds, dtype=np.float64)
    expected = np.maximum(measured, _SHORTEST_STEP)
    for _ in range(_FIT_ROUNDS):
        solution = non_negative_least_squares(matrix / expected[:, None], measured / expected)
        expected = np.maximum(matrix @ np.array(solution), _SHORTEST_STEP)
    intercept, prefill, decode, prefill_context, decode_context, pair = solution
    return LinearStepTime(intercept, 0.0, prefill, decode, prefill_context, decode_context, pair)


def _features(shape: StepShape) -> tuple[float, ...]:
    """What the coefficients of a fit stand before; the number of all tokens is the sum of two others."""
    return (
        1.0,
        shape.num_prefill_tokens,
        shape.num_decode_tokens,
        shape.prefill_context,
        shape.decode_context,
        shape.prefill_pairs,
    )


def non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Minimise |matrix @ x - target| with x >= 0, by leaving out the most negative coefficient until none is."""
    columns = list(range(matrix.shape[1]))
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    while columns:
        solution = np.linalg.lstsq(matrix[:, columns] / scale[columns], target, rcond=None)[0]
        if solution.min() >= 0:
            break
        columns.pop(int(solution.argmin()))
    full = np.zeros(matrix.shape[1])
    full[columns] = solution / scale[columns] if columns else 0.0
    return [float(value) for value in full]


DEVICES = {
    device.name: device
    for device in (
        # Fitted to the published FCFS run of the Arena trace by `benchmarks/arena.py --calibrate`; the KV pool is that
        # run's. What a chunk's context costs cannot be seen there (prompts ran whole): taken as that of a decode.
        Device(
            "a10g-llama-2-7b",
            10_000,
            LinearStepTime(
                0.02884,
                per_prefill_token=1.942e-4,
                per_decode_token=1.111e-4,
                per_prefill_context=1.224e-6,
                per_decode_context=1.224e-6,
            ),
        ),
        # Coefficients of Niyama's deadline scheduler (microsoft/sarathi-serve, branch niyama_asplos2026). The device is
        # not named there; its scripts run Llama-3-8B. Beyond 2,552 tokens in a step they extrapolate.
        Device(
            "h100-8b",
            32_768,
            LinearStepTime(0.014936, 5.882475e-5, 2.247956e-5, 3.634519e-5, 7.554773e-7, 1.111258e-7),
            LinearStepTime(0.005004, 2.719050e-5, 6.863043e-5, -4.143993e-5, 2.727223e-6, 1.663409e-7),
            threshold=512,
        ),
        # SmolLM2-135M in float32 on two cores of an AMD EPYC (AVX2): 2,354 steps of the real engine with 1 to 30 clients,
        # recorded and fitted by `make bench-step-time`. Steps that were not fitted, at the speed that the machine had around
        # them: off by -14, +3, +16 and +26 % (p10, p50, p90, p99), by 0.0 % in all. That speed varied, so that steps took
        # 0.82 to 1.48 times as long (p5, p95): without it they are off by -26, +10, +28 and +42 %, by -8 % in all.
        Device(
            "cpu-135m",
            23_296,
            LinearStepTime(
                0.03172,
                per_prefill_token=1.465e-3,
                per_decode_token=6.285e-4,
                per_decode_context=5.467e-6,
                per_prefill_pair=8.503e-7,
            ),
            max_num_batched_tokens=256,
            max_num_seqs=32,
        ),
    )
}
