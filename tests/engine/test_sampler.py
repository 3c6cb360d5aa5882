"""The sampler draws from exactly the distribution that its parameters define, and reproducibly."""

import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_engine.core.adjustments import Adjustments
from evenhand_engine.core.sampler import SamplingRow, Seats, Token, accept, sample
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import Sampled, SamplingParams
from evenhand_kernels.kernels import Draw, Kernels
from evenhand_kernels.reference import ReferenceKernels

PROBABILITIES = (0.02, 0.3, 0.08, 0.25, 0.05, 0.15, 0.1, 0.05)
LOGITS = torch.tensor(PROBABILITIES).log() + 3.7  # any constant


def row(index: int = 0, **params: Any) -> SamplingRow:
    sampling_params = SamplingParams(max_tokens=10_000, **params)
    return SamplingRow(sampling_params, index, Adjustments.of(sampling_params), np.zeros(index, np.int32))


def ids(logits: Tensor, rows: Sequence[SamplingRow], kernels: Kernels) -> list[int | None]:
    return [None if token is None else token.token_id for token in sample(logits, rows, kernels)]


def draw(kernels: Kernels, logits: Tensor, num_draws: int, **params: Any) -> Tensor:
    """How often each token is drawn by the first output tokens of one request."""
    rows = [row(index, seed=5, **params) for index in range(num_draws)]
    token_ids = ids(logits.expand(num_draws, -1).clone(), rows, kernels)
    return torch.bincount(torch.tensor(token_ids), minlength=len(logits)).double()


def expected_distribution(temperature: float, kept: set[int]) -> Tensor:
    weights = torch.tensor(PROBABILITIES, dtype=torch.float64) ** (1 / temperature)
    weights[[index not in kept for index in range(len(PROBABILITIES))]] = 0
    return weights / weights.sum()


ALL = set(range(8))


@pytest.mark.parametrize(
    "params, kept",
    [
        ({}, ALL),
        ({"temperature": 0.5}, ALL),
        ({"temperature": 2.0}, ALL),
        ({"top_k": 3}, {1, 3, 5}),
        ({"top_k": 100}, ALL),
        ({"top_p": 0.5}, {1, 3}),  # 0.3 is not enough, 0.55 is
        ({"top_p": 0.6}, {1, 3, 5}),
        ({"top_p": 0.96}, ALL - {0}),  # the two tokens of 0.05 stay or go together
        ({"top_k": 4, "top_p": 0.6}, {1, 3}),  # top_p counts the mass that top_k left: 0.55 of 0.8
        ({"temperature": 2.0, "top_p": 0.5}, {1, 3, 5}),  # of the distribution after the temperature
        ({"min_p": 0.5}, {1, 3, 5}),  # at least 0.15
        ({"temperature": 2.0, "min_p": 0.5}, ALL - {0, 4, 7}),  # a quarter of the likeliest, before the temperature
        ({"min_p": 0.3, "top_p": 0.9}, {1, 3, 5, 6}),  # 0.8 is left of all, of which the first three have 0.875
    ],
)
def test_draws_follow_the_distribution(kernels: Kernels, params: dict[str, Any], kept: set[int]) -> None:
    num_draws = 8_000
    counts = draw(kernels, LOGITS, num_draws, **params)
    expected = expected_distribution(params.get("temperature", 1.0), kept) * num_draws

    assert counts[expected == 0].sum() == 0, "a token that should be cut off was drawn"
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 4


def test_a_large_vocabulary_is_cut_exactly(kernels: Kernels) -> None:
    """top_p must not lose mass to the tail, whose tokens are many and tiny."""
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 2
    probabilities = logits.double().softmax(-1)
    order = probabilities.argsort(descending=True)
    num_kept = int((probabilities[order].cumsum(0) < 0.9).sum()) + 1

    drawn = set(draw(kernels, logits, 4_000, top_p=0.9).nonzero()[:, 0].tolist())

    assert drawn <= set(order[:num_kept].tolist())
    assert drawn & set(order[num_kept // 2 : num_kept].tolist()), "the kept tail is never drawn"


@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 5_000])
@pytest.mark.parametrize("top_k", [0, 1, 20, 400])
def test_every_token_is_drawn_by_its_own_share(kernels: Kernels, vocab_size: int, top_k: int) -> None:
    """At any vocabulary size the token drawn is the one at which the kept tokens' cumulated share passes the number."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2
    probabilities = logits.double().softmax(-1)
    if 0 < top_k < vocab_size:
        probabilities[probabilities < probabilities.sort().values[-top_k]] = 0
    cumulative = (probabilities / probabilities.sum()).cumsum(0)

    for index in range(200):
        drawn = ids(logits[None].clone(), [row(index=index, seed=9, top_k=top_k)], kernels)[0]
        number = (np.random.Philox(key=9, counter=index).random_raw() >> 11) * 2.0**-53
        assert cumulative[drawn] > number - 1e-6
        assert drawn == 0 or cumulative[drawn - 1] < number + 1e-6
        assert probabilities[drawn] > 0


def test_temperature_zero_takes_the_best_token_and_the_first_of_equals(kernels: Kernels) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert ids(logits, [row(temperature=0), row(temperature=0, top_p=0.1, seed=3)], kernels) == [1, 0]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"temperature": 1e-30}])
def test_the_narrowest_settings_are_greedy(kernels: Kernels, params: dict[str, Any]) -> None:
    assert draw(kernels, LOGITS, 50, **params)[1] == 50


def test_a_token_depends_on_seed_and_index_alone(kernels: Kernels) -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1))
    rows = [row(index=7, seed=1), row(temperature=0), row(index=2, seed=3, top_p=0.8), row(seed=-5, top_k=40)]
    alone = [ids(logits[number : number + 1].clone(), [rows[number]], kernels)[0] for number in range(4)]

    assert ids(logits[:4].clone(), rows, kernels) == alone
    assert ids(logits[[3, 2, 1, 0]].clone(), rows[::-1], kernels) == alone[::-1]
    assert ids(logits[:4].clone(), rows, kernels) == alone, "no hidden state"


def test_seeds_and_positions_give_independent_numbers(kernels: Kernels) -> None:
    logits = torch.zeros(1, 1000)
    by_index = {ids(logits.clone(), [row(index=index, seed=1)], kernels)[0] for index in range(300)}
    by_seed = {ids(logits.clone(), [row(seed=seed)], kernels)[0] for seed in range(300)}
    assert min(len(by_index), len(by_seed)) > 230  # 259 of 1,000 are expected


def test_no_stop_token_before_min_tokens(kernels: Kernels) -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 1.0]])
    params = {"min_tokens": 3, "stop_token_ids": frozenset({1, 2}), "temperature": 0}
    assert [ids(logits.clone(), [row(index=index, **params)], kernels)[0] for index in range(5)] == [3, 3, 3, 1, 1]


def mask_of(tokens: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def test_masked_tokens_are_not_drawn(kernels: Kernels) -> None:
    """Of the rows that have a mask; what is told of the distribution is the model's own."""
    logits = torch.stack([LOGITS, LOGITS])
    rows = [row(temperature=0, num_logprobs=1)] * 2
    first, second = sample(logits, rows, kernels, {1: mask_of([4], 8)})
    assert first is not None and second is not None
    assert (first.token_id, second.token_id) == (1, 4)
    assert second.logprobs is not None and second.logprobs.top_token_ids == (1,)
    assert sample(LOGITS[None].clone(), [row()], kernels, {0: mask_of([], 8)}) == [None]


@pytest.mark.parametrize("vocab_size", [1, 7, 16, 31, 33, 300, 5_000])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.6, "temperature": 0.3}, {"min_p": 0.2}]
)
def test_a_mask_is_as_if_all_other_logits_were_nothing(
    kernels: Kernels, vocab_size: int, params: dict[str, Any]
) -> None:
    """Also where these are no numbers: whatever may not come does not matter."""
    generator = np.random.default_rng(vocab_size)
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    rows = [row(index=index, seed=2, **params) for index in range(40)]
    masks, without = {}, logits.clone()
    for number in range(0, 40, 2):
        num_allowed = 1 + number * vocab_size // 40
        tokens = generator.permutation(vocab_size)[:num_allowed]
        masks[number] = mask_of(tokens, vocab_size)
        others = np.setdiff1d(np.arange(vocab_size), tokens)
        without[number, others] = -math.inf
        logits[number, others[::2]] = math.nan
    found = [None if token is None else token.token_id for token in sample(logits, rows, kernels, masks)]
    assert found == ids(without, rows, kernels)


def test_no_rows_no_tokens(kernels: Kernels) -> None:
    assert ids(torch.empty(0, 10), [], kernels) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(
    kernels: Kernels, bad: float, params: dict[str, Any]
) -> None:
    logits = torch.stack([LOGITS, LOGITS.clone(), LOGITS])
    logits[1, 3 if bad > 0 or math.isnan(bad) else slice(None)] = bad
    rows = [row(seed=4, **params)] * 3
    good = ids(LOGITS[None].clone(), rows[:1], kernels)[0]
    assert ids(logits, rows, kernels) == [good, None, good]


def test_a_row_whose_every_token_is_forbidden_has_none(kernels: Kernels) -> None:
    assert ids(torch.zeros(1, 3), [row(min_tokens=1, stop_token_ids=frozenset(range(3)))], kernels) == [None]


def test_log_probabilities_are_those_of_the_model_itself(kernels: Kernels) -> None:
    params = {"temperature": 0, "min_tokens": 1, "stop_token_ids": frozenset({1}), "num_logprobs": 3}
    (token,) = sample(LOGITS[None].clone(), [row(**params)], kernels)
    assert token is not None and token.logprobs is not None
    assert token.token_id == 3, "token 1, the likeliest, may not come yet"
    assert token.logprobs.logprob == pytest.approx(math.log(0.25), abs=1e-6)
    assert token.logprobs.rank == 2
    assert token.logprobs.top_token_ids == (1, 3, 5)
    assert token.logprobs.top_logprobs == pytest.approx([math.log(p) for p in (0.3, 0.25, 0.15)], abs=1e-6)


@pytest.mark.parametrize(("num_logprobs", "num_told"), [(0, 0), (8, 8), (20, 8)])
def test_as_many_log_probabilities_as_asked_for_and_there_are(
    kernels: Kernels, num_logprobs: int, num_told: int
) -> None:
    (token,) = sample(LOGITS[None].clone(), [row(num_logprobs=num_logprobs)], kernels)
    assert token is not None and token.logprobs is not None
    assert len(token.logprobs.top_token_ids) == len(token.logprobs.top_logprobs) == num_told
    assert sample(LOGITS[None].clone(), [row()], kernels) == [Token(token.token_id)]


def test_each_seat_is_sampled_as_who_has_it_asked() -> None:
    first, second = SamplingParams(max_tokens=9, seed=1), SamplingParams(max_tokens=9, seed=2)
    seats = Seats(lambda seat, end: np.full(end, seat, np.int32))
    chunks = (ScheduledRequest(5, 0, 4, 0), ScheduledRequest(2, 0, 3, 1))
    started = (
        StartedRequest(5, "a", array("I", range(6)), 6, first),
        StartedRequest(2, "b", array("I", range(3)), 3, second),
    )
    assert seats.prepare(Batch(1, chunks, started=started)) == [SamplingRow(second, 0)]
    mixed = (ScheduledRequest(2, 3, 1, 1), ScheduledRequest(5, 4, 2, 1))
    assert seats.prepare(Batch(2, mixed, num_decodes=1)) == [SamplingRow(second, 1), SamplingRow(first, 0)]
    again = (StartedRequest(2, "a", array("I", range(8)), 6, first),)
    drafted = (ScheduledRequest(2, 8, 3, 3, draft_token_ids=(7, 7)),)
    assert seats.prepare(Batch(3, drafted, 1, again)) == [SamplingRow(first, index) for index in (3, 4, 5)]


@pytest.mark.parametrize(
    ("sampled", "accepted"),
    [
        ((8, 9, 4), (8, 9, 4)),  # both drafts were right: one more token is free
        ((8, 1, 4), (8, 1)),
        ((1, 9, 4), (1,)),  # what follows a wrong draft was computed from it
        ((8, None, 4), (8,)),
        ((None, 9, 4), ()),
    ],
)
def test_drafts_count_as_far_as_they_are_what_was_sampled(
    sampled: tuple[int | None, ...], accepted: tuple[int, ...]
) -> None:
    items = (
        ScheduledRequest(0, 6, 1, 1),
        ScheduledRequest(1, 3, 3, 3, draft_token_ids=(8, 9)),
        ScheduledRequest(2, 0, 9, 0),
    )
    tokens = [Token(5), *(None if token is None else Token(token) for token in sampled)]
    assert accept(Batch(1, items, num_decodes=2), tokens) == [Sampled((5,)), Sampled(accepted)]


@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (50, 1.0), (0, 0.9), (0, 0.1), (40, 0.9), (1, 0.5)])
def test_all_kernels_draw_the_same_tokens(kernels: Kernels, spread: float, top_k: int, top_p: float) -> None:
    logits = spread * torch.randn(60, 9_001, generator=torch.Generator().manual_seed(0))
    draws = [Draw(0.8, top_p, top_k, 2**64 - 1 - number, 2**40 + number) for number in range(len(logits))]
    assert kernels.draw(logits.clone(), draws) == ReferenceKernels().draw(logits.clone(), draws)
