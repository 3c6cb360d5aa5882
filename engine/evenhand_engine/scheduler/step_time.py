"""StepTimeModel: how long a step takes, fitted online; StepShape: what of a step its time depends on."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from evenhand_engine.scheduler.batch import Batch

FEWEST_STEPS = 8
"""A fit has six unknowns; fewer steps than this say nothing."""

_SCALES = (1.0, 1e-2, 1e-4, 1e-6)  # bring the four features to the order of one
_FORGETTING = 0.99  # a sample's weight halves every 70 steps
_FEWEST_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes.

    Attributes:
        num_prefill_tokens: of prompts, and of outputs that are computed again after a preemption.
        num_decode_tokens: one for each stream.
        prefill_context: tokens of the same requests that were computed before these chunks.
        decode_context: tokens in the KV cache of all streams.
        prefill_pairs: query-key pairs of the chunks: each token with itself and all before it. What their attention costs.
    """

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    prefill_context: int = 0
    decode_context: int = 0
    prefill_pairs: int = 0

    def with_decodes(self, num_tokens: int, context: int) -> "StepShape":
        """And so many streams with a token each, after `context` tokens in all."""
        return StepShape(
            self.num_prefill_tokens,
            self.num_decode_tokens + num_tokens,
            self.prefill_context,
            self.decode_context + context,
            self.prefill_pairs,
        )

    def with_chunk(self, num_tokens: int, context: int) -> "StepShape":
        """And so many tokens of a prompt, after `context` tokens of it."""
        return StepShape(
            self.num_prefill_tokens + num_tokens,
            self.num_decode_tokens,
            self.prefill_context + context,
            self.decode_context,
            self.prefill_pairs + num_tokens * (2 * context + num_tokens + 1) // 2,
        )


def shape_of(batch: Batch) -> StepShape:
    decodes = batch.scheduled[: batch.num_decodes]
    shape = StepShape().with_decodes(
        sum(item.num_scheduled_tokens for item in decodes), sum(item.num_computed_tokens for item in decodes)
    )
    for item in batch.scheduled[batch.num_decodes :]:
        shape = shape.with_chunk(item.num_scheduled_tokens, item.num_computed_tokens)
    return shape


class StepTimeModel:
    """seconds = a + b * tokens + c * decode context + d * prefill pairs, by recursive least squares with forgetting.

    Recursive least squares: Haykin, Adaptive Filter Theory, chapter 10. Small on purpose: four features, no matrix
    library, a few microseconds a step.

    Attributes:
        coefficients: seconds per step, per token, per token of decode context, per query-key pair; never negative.
    """

    def __init__(self) -> None:
        size = len(_SCALES)
        self.coefficients: tuple[float, ...] = (0.0,) * size
        self._coefficients = [0.0] * size  # of the scaled features, as they come out
        self._covariance = [[1e3 if row == column else 0.0 for column in range(size)] for row in range(size)]
        self._num_samples = 0

    @property
    def is_fitted(self) -> bool:
        """Whether enough steps were seen to predict from."""
        return self._num_samples >= _FEWEST_SAMPLES

    def predict(self, shape: StepShape) -> float:
        """Seconds that a step of this shape takes."""
        return _product(_features(shape), self.coefficients)

    def seconds_at(self, part: float, num_tokens: int) -> float:
        """The shortest step that computes prompts at this part of the rate of a step of `num_tokens`, their context left
        out; 0: any does. n tokens take a + b * n, so it has the least n with n / (a + b * n) >= part * N / (a + b * N)."""
        per_step, per_token, _, _ = self.coefficients
        if per_step == 0:
            return 0.0
        least = part * num_tokens * per_step / (per_step + (1 - part) * per_token * num_tokens)
        return per_step + per_token * least

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn from one step."""
        features = list(map(mul, _features(shape), _SCALES))
        covariance = self._covariance
        gains = [_product(row, features) for row in covariance]
        scale = _FORGETTING + _product(features, gains)
        error = seconds - _product(self._coefficients, features)
        self._coefficients = [c + gain / scale * error for c, gain in zip(self._coefficients, gains, strict=True)]
        trace = sum(covariance[i][i] for i in range(len(covariance)))
        forgetting = _FORGETTING if trace < 1e4 else 1.0  # without news the covariance would grow for ever
        self._covariance = [
            [(p - gain * other / scale) / forgetting for p, other in zip(row, gains, strict=True)]
            for row, gain in zip(covariance, gains, strict=True)
        ]
        self.coefficients = tuple([max(0.0, c) * unit for c, unit in zip(self._coefficients, _SCALES, strict=True)])
        self._num_samples += 1


def _product(one: Sequence[float], other: Sequence[float]) -> float:
    """Inner product of two of the same length."""
    return float(sum(map(mul, one, other)))


def _features(shape: StepShape) -> tuple[int, ...]:
    """What the coefficients stand before. Fewer than a recorded run is fitted by: a few steps must be enough."""
    return 1, shape.num_prefill_tokens + shape.num_decode_tokens, shape.decode_context, shape.prefill_pairs
