"""StepTimeModel: how long a step takes, fitted online, and StepBudget: how much may go into one step."""

from collections.abc import Sequence
from dataclasses import dataclass

from evenhand_engine.scheduler.batch import Batch

FEWEST_STEPS = 8
"""A fit has six unknowns; fewer steps than this say nothing."""

_SCALES = (1.0, 1e-2, 1e-4, 1e-6)  # bring the four features to the order of one
_FORGETTING = 0.99  # a sample's weight halves every 70 steps
_FEWEST_SAMPLES = 8
_NEVER = float("inf")


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

    num_prefill_tokens: int
    num_decode_tokens: int
    prefill_context: int
    decode_context: int
    prefill_pairs: int = 0


def shape_of(batch: Batch) -> StepShape:
    decodes, chunks = batch.scheduled[: batch.num_decodes], batch.scheduled[batch.num_decodes :]
    prefill = prefill_context = prefill_pairs = 0
    for item in chunks:
        num_tokens, context = item.num_scheduled_tokens, item.num_computed_tokens
        prefill += num_tokens
        prefill_context += context
        prefill_pairs += num_tokens * (2 * context + num_tokens + 1) // 2
    return StepShape(
        num_prefill_tokens=prefill,
        num_decode_tokens=sum(item.num_scheduled_tokens for item in decodes),
        prefill_context=prefill_context,
        decode_context=sum(item.num_computed_tokens for item in decodes),
        prefill_pairs=prefill_pairs,
    )


@dataclass(slots=True)
class StepLoad:
    """What makes a step slow: tokens, context read by single tokens, and query-key pairs of longer chunks."""

    num_tokens: int = 0
    decode_context: int = 0
    chunk_pairs: int = 0

    def add(self, num_computed_tokens: int, num_scheduled_tokens: int) -> None:
        """Count one request's part: `num_scheduled_tokens` after a context of `num_computed_tokens`."""
        self.num_tokens += num_scheduled_tokens
        if num_scheduled_tokens == 1:
            self.decode_context += num_computed_tokens
        else:
            self.chunk_pairs += num_scheduled_tokens * (2 * num_computed_tokens + num_scheduled_tokens) // 2

    def features(self) -> tuple[float, ...]:
        """The load as a vector, scaled, with a constant first."""
        values = (1.0, self.num_tokens, self.decode_context, self.chunk_pairs)
        return tuple(value * scale for value, scale in zip(values, _SCALES, strict=True))


class StepTimeModel:
    """seconds = a + b * tokens + c * decode context + d * chunk pairs, by recursive least squares with forgetting.

    Recursive least squares: Haykin, Adaptive Filter Theory, chapter 10. Small on purpose: four features, no matrix
    library, a few microseconds a step.
    """

    def __init__(self) -> None:
        size = len(_SCALES)
        self._coefficients = [0.0] * size
        self._covariance = [[1e3 if row == column else 0.0 for column in range(size)] for row in range(size)]
        self._num_samples = 0

    @property
    def is_fitted(self) -> bool:
        """Whether enough steps were seen to predict from."""
        return self._num_samples >= _FEWEST_SAMPLES

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds: per step, per token, per token of decode context, per query-key pair; never negative."""
        return tuple(max(0.0, value) * scale for value, scale in zip(self._coefficients, _SCALES, strict=True))

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step of this load takes."""
        values = (1, load.num_tokens, load.decode_context, load.chunk_pairs)
        return sum(value * seconds for value, seconds in zip(values, self.coefficients, strict=True))

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from one step."""
        features, covariance = load.features(), self._covariance
        gains = [sum(p * x for p, x in zip(row, features, strict=True)) for row in covariance]
        scale = _FORGETTING + sum(x * gain for x, gain in zip(features, gains, strict=True))
        error = seconds - sum(c * x for c, x in zip(self._coefficients, features, strict=True))
        self._coefficients = [c + gain / scale * error for c, gain in zip(self._coefficients, gains, strict=True)]
        trace = sum(covariance[i][i] for i in range(len(covariance)))
        forgetting = _FORGETTING if trace < 1e4 else 1.0  # without news the covariance would grow for ever
        self._covariance = [
            [(p - gain * other / scale) / forgetting for p, other in zip(row, gains, strict=True)]
            for row, gain in zip(covariance, gains, strict=True)
        ]
        self._num_samples += 1


class StepBudget:
    """Room left in the step that is being planned: tokens, and seconds where inter-token objectives bind."""

    def __init__(
        self, max_tokens: int, model: StepTimeModel, objectives: Sequence[float], min_prefill_tokens: int
    ) -> None:
        """`objectives`: seconds that the step should not exceed. `min_prefill_tokens`: what prompts may use beyond these,
        so that they advance whatever decodes take."""
        self.tokens = max_tokens
        self.load = StepLoad()
        self._model = model
        self._objectives = objectives
        self._max_seconds = min(objectives, default=_NEVER)
        self._min_prefill_tokens = min_prefill_tokens
        self._num_prompt_tokens = 0

    def spend(self, num_computed_tokens: int, num_scheduled_tokens: int) -> None:
        """Note that a part of a prompt was scheduled."""
        self.tokens -= num_scheduled_tokens
        self._num_prompt_tokens += num_scheduled_tokens
        self.load.add(num_computed_tokens, num_scheduled_tokens)

    def spend_decodes(self, num_decodes: int, context: int) -> None:
        """Note what all streams compute in this step: a token each, after `context` tokens in all.

        An objective that they miss alone no longer binds: shorter chunks of prompts could not meet it either.
        """
        self.tokens -= num_decodes
        self.load.num_tokens += num_decodes
        self.load.decode_context += context
        if self._model.is_fitted:
            seconds = self._model.predict(self.load)
            self._max_seconds = min((limit for limit in self._objectives if limit >= seconds), default=_NEVER)

    def has_room_for_decodes(self, num_decodes: int, context: int, max_seconds: float) -> bool:
        """Whether so many streams may compute a token each, after `context` tokens in all, if nothing else is planned;
        `max_seconds`: the objective that binds them. Before steps can be predicted, no objective does."""
        if num_decodes > self.tokens:
            return False
        if max_seconds == _NEVER or not self._objectives or not self._model.is_fitted:
            return True
        return self._model.predict(StepLoad(num_decodes, context)) <= max_seconds

    def fit(self, num_computed_tokens: int, num_pending_tokens: int) -> int:
        """How many of a prompt's pending tokens still go into this step; 0: none."""
        most = min(num_pending_tokens, self.tokens)
        if self._max_seconds == _NEVER or most <= 0:
            return max(0, most)
        if not self._model.is_fitted:
            return max(0, min(most, 4 * self._min_prefill_tokens - self._num_prompt_tokens))
        _, per_token, _, per_pair = self._model.coefficients
        seconds = self._max_seconds - self._model.predict(self.load)
        # largest x with (per_token + per_pair * context) * x + per_pair / 2 * x^2 <= seconds
        slope, half = per_token + per_pair * num_computed_tokens, per_pair / 2
        if seconds <= 0:
            affordable = 0.0
        elif half * most * most < 1e-3 * slope * most or half == 0:
            affordable = seconds / slope if slope else float(most)
        else:
            affordable = (-slope + (slope * slope + 4 * half * seconds) ** 0.5) / (2 * half)
        return max(0, min(most, max(int(min(affordable, most)), self._min_prefill_tokens - self._num_prompt_tokens)))
