"""What a request does to its logits is what the logits processors of transformers do, and vLLM's formulas where it has none."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation import logits_process

from evenhand_engine.core.adjustments import Adjustments
from evenhand_engine.core.sampler import Seats
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import SamplingParams

VOCAB_SIZE = 50
PROMPT = [3, 7, 7, 11, 49]
OUTPUTS = [7, 20, 21, 20, 0]


def logits() -> NDArray[np.float32]:
    return np.random.default_rng(4).normal(0, 4, VOCAB_SIZE).astype(np.float32)


def adjusted(num_outputs: int = len(OUTPUTS), **params: Any) -> NDArray[np.float32]:
    """The logits after so many outputs."""
    adjustments = Adjustments.of(SamplingParams(max_tokens=99, **params))
    assert adjustments is not None
    token_ids = np.array(PROMPT + OUTPUTS[:num_outputs], np.int32)
    found = logits()
    adjustments.apply(found, token_ids, num_outputs)
    return found


def processed(processor: Any, token_ids: list[int] | None = None) -> NDArray[np.float32]:
    """What transformers makes of the same logits."""
    ids = torch.tensor([PROMPT + OUTPUTS if token_ids is None else token_ids])
    result: NDArray[np.float32] = processor(ids, torch.from_numpy(logits())[None])[0].numpy()
    return result


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty(penalty: float) -> None:
    expected = processed(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    np.testing.assert_allclose(adjusted(repetition_penalty=penalty), expected, rtol=1e-6)
    assert (expected != logits()).sum() == len({*PROMPT, *OUTPUTS})


@pytest.mark.parametrize("bias", [((5, 2.5),), ((5, -100.0), (49, 3.0), (0, 0.25))])
def test_bias(bias: tuple[tuple[int, float], ...]) -> None:
    expected = processed(logits_process.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias]))
    np.testing.assert_allclose(adjusted(logit_bias=bias), expected, rtol=1e-6)


@pytest.mark.parametrize("words", [((7,),), ((20, 0, 9),), ((0, 9), (21, 8), (0, 4)), ((1, 2, 3, 4, 5, 6, 7, 8, 9),)])
def test_bad_words(words: tuple[tuple[int, ...], ...]) -> None:
    expected = processed(logits_process.NoBadWordsLogitsProcessor([list(word) for word in words]), OUTPUTS)
    np.testing.assert_array_equal(adjusted(bad_words_token_ids=words), expected)


def test_bad_words_do_not_begin_in_the_prompt() -> None:
    np.testing.assert_array_equal(adjusted(0, bad_words_token_ids=((49, 7),)), logits())
    np.testing.assert_array_equal(adjusted(1, bad_words_token_ids=((49, 7, 9),)), logits())


def test_allowed_tokens() -> None:
    allowed = {2, 7, 49}
    expected = processed(logits_process.SuppressTokensLogitsProcessor(sorted(set(range(VOCAB_SIZE)) - allowed)))
    np.testing.assert_array_equal(adjusted(allowed_token_ids=frozenset(allowed)), expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("min_p", [1e-2, 0.1, 1.0])
def test_min_p(min_p: float, temperature: float) -> None:
    warper = logits_process.MinPLogitsWarper(min_p)
    kept = torch.isfinite(warper(torch.tensor([[0]]), torch.from_numpy(logits())[None] / temperature))[0].numpy()
    np.testing.assert_array_equal(
        adjusted(min_p=min_p, temperature=temperature), np.where(kept, logits(), -np.inf).astype(np.float32)
    )
    assert 0 < kept.sum() < VOCAB_SIZE


def test_frequency_and_presence_penalties_count_outputs_alone() -> None:
    counts = Counter(OUTPUTS)
    expected = [
        value - 0.7 * counts[token] - (0.3 if token in counts else 0) for token, value in enumerate(logits().tolist())
    ]
    np.testing.assert_allclose(adjusted(frequency_penalty=0.7, presence_penalty=0.3), expected, rtol=1e-5)
    np.testing.assert_array_equal(adjusted(0, frequency_penalty=0.7, presence_penalty=0.3), logits())


def test_all_of_them_in_vllms_order() -> None:
    """allowed, stop tokens, bad words, bias, penalties, min_p."""
    params: dict[str, Any] = {
        "allowed_token_ids": frozenset({0, 5, 7, 9, 20, 30}),
        "min_tokens": 6,
        "stop_token_ids": frozenset({30, 31}),
        "bad_words_token_ids": ((0, 9),),
        "logit_bias": ((7, 4.0), (9, 50.0), (20, 10.0)),
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.25,
        "presence_penalty": 0.5,
    }
    by_hand = {}
    for token in (0, 5, 7, 20):
        value = float(logits()[token]) + {7: 4.0, 20: 10.0}.get(token, 0.0)
        if token in PROMPT + OUTPUTS:
            value = value / 1.5 if value > 0 else value * 1.5
        by_hand[token] = value - 0.25 * OUTPUTS.count(token) - 0.5 * (token in OUTPUTS)
    found = adjusted(**params)
    assert {token: value for token, value in enumerate(found.tolist()) if value > -math.inf} == pytest.approx(
        by_hand, rel=1e-5
    )
    best = max(by_hand.values())
    cut = adjusted(**params, min_p=0.01)
    assert np.isfinite(cut).tolist() == [by_hand.get(t, -math.inf) >= best + math.log(0.01) for t in range(VOCAB_SIZE)]


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0, "presence_penalty": -1.0},
        {"logit_bias": ((1, 1.0),), "allowed_token_ids": frozenset({1, 2})},
        {"bad_words_token_ids": ((1,),), "min_p": 0.5},
    ],
)
def test_what_is_not_finite_stays_so(params: dict[str, Any]) -> None:
    """So that the kernels see it, and give the row no token."""
    adjustments = Adjustments.of(SamplingParams(max_tokens=9, **params))
    assert adjustments is not None
    for bad in (math.nan, math.inf):
        row = np.full(4, bad, np.float32)
        adjustments.apply(row, np.array([1, 2], np.int32), 1)
        assert not np.isfinite(row.max())


def test_a_request_that_asks_for_nothing_costs_nothing() -> None:
    plain = SamplingParams(max_tokens=9, temperature=0.7, top_k=3, stop_token_ids=frozenset({1}), num_logprobs=2)
    assert Adjustments.of(plain) is None


def test_each_row_sees_its_own_tokens() -> None:
    """Also with drafts, which are tokens of the rows after them, and after a preemption."""
    tokens = np.arange(40, dtype=np.int32)
    seats = Seats(lambda seat, end: tokens[:end] + 100 * seat)
    params = SamplingParams(max_tokens=9, repetition_penalty=2.0)
    started = StartedRequest(3, "a", tokens[:8], 6, params)  # type: ignore[arg-type]
    rows = seats.prepare(Batch(1, (ScheduledRequest(3, 0, 10, 3, draft_token_ids=(8, 9)),), started=(started,)))
    assert [row.index for row in rows] == [2, 3, 4]
    assert [row.token_ids.tolist() for row in rows] == [(300 + tokens[:end]).tolist() for end in (8, 9, 10)]
    assert all(row.adjustments is not None for row in rows)
    plain = Batch(2, (ScheduledRequest(3, 0, 4, 1),), started=(replace_params(started),))
    assert [(row.adjustments, len(row.token_ids)) for row in seats.prepare(plain)] == [(None, 0)]


def replace_params(started: StartedRequest) -> StartedRequest:
    return StartedRequest(started.seat, "b", started.token_ids, 4, SamplingParams(max_tokens=1))
