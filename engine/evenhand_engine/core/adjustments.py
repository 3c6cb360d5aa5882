"""Adjustments: what a request does to its logits before a token is drawn of them: masks, biases, penalties, min_p.

In vLLM's order: allowed tokens, stop tokens before `min_tokens`, bad words, bias, repetition penalty, frequency and presence
penalty, and min_p of what the temperature makes of the rest. Each is a function of the request's own tokens alone.
"""

import math
from collections.abc import Iterable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from evenhand_engine.scheduler.request import SamplingParams

MIN_TEMPERATURE = 1e-5
"""Below it sampling is greedy: the quotients would overflow, and the best token has all the probability anyway."""


class Adjustments:
    """Those of one request, prepared once."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else _ids(sorted(allowed))
        self._stop = _ids(sorted(params.stop_token_ids))
        self._bias_tokens = _ids(token_id for token_id, _ in params.logit_bias)
        self._bias_values = np.array([value for _, value in params.logit_bias], np.float32)
        self._min_p = 0.0 if params.temperature < MIN_TEMPERATURE else params.min_p

    @classmethod
    def of(cls, params: SamplingParams) -> Self | None:
        """None where the logits stay as they are."""
        asks = (
            params.allowed_token_ids is not None
            or (params.min_tokens > 0 and bool(params.stop_token_ids))
            or bool(params.bad_words_token_ids)
            or bool(params.logit_bias)
            or params.repetition_penalty != 1
            or params.frequency_penalty != 0
            or params.presence_penalty != 0
            or params.min_p > 0
        )
        return cls(params) if asks else None

    def apply(self, logits: NDArray[np.float32], token_ids: NDArray[np.int32], index: int) -> None:
        """Change `logits`, [vocab_size], of the token that follows `token_ids`, the last `index` of which are outputs."""
        params, outputs = self._params, token_ids[len(token_ids) - index :]
        if self._allowed is not None:
            kept = logits[self._allowed]
            logits[:] = -np.inf
            logits[self._allowed] = kept
        if index < params.min_tokens:
            logits[self._stop] = -np.inf
        for *before, last in params.bad_words_token_ids:
            if not before or (len(before) <= index and outputs[-len(before) :].tolist() == before):
                logits[last] = -np.inf
        logits[self._bias_tokens] += self._bias_values
        self._penalize(logits, token_ids, outputs)
        if self._min_p > 0:
            logits[logits < logits.max() + params.temperature * math.log(self._min_p)] = -np.inf

    def _penalize(self, logits: NDArray[np.float32], token_ids: NDArray[np.int32], outputs: NDArray[np.int32]) -> None:
        params = self._params
        if params.repetition_penalty != 1:
            seen = np.unique(token_ids)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            tokens, counts = np.unique(outputs, return_counts=True)
            logits[tokens] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)


def _ids(token_ids: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(token_ids, np.int64)
