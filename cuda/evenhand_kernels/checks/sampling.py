"""Cases of the sampling kernels: the same draws as a sampler in numpy that follows the engine's own, number by number."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evenhand_kernels.checks.case import Case, assert_close, exact
from evenhand_kernels.cuda.sampling import Adjustments, DeviceSampler, SamplingRows
from evenhand_kernels.device import Device

Floats = NDArray[np.float64]
KERNELS = frozenset({"sample", "adjust", "count_tokens"})
THREADS = 64


@dataclass(frozen=True)
class Parameters:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    index: int = 0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0


def expected_tokens(logits: Floats, row: Parameters) -> set[int]:
    """The token that the definition gives in float64, and those that a rounding of 1e-5 could make of it."""
    if row.temperature < 1e-5:
        return {int(logits.argmax())}
    results = set()
    weights = np.exp((logits - logits.max()) / row.temperature)
    for shift in (1 - 1e-5, 1.0, 1 + 1e-5):
        kept = weights >= max(row.min_p * shift, 2.0**-40)
        if 0 < row.top_k < len(weights):
            kept &= weights >= np.sort(weights)[-row.top_k] * (1 - 1e-6)
        if row.top_p < 1:
            order = np.sort(weights[kept])[::-1]
            number = order.cumsum().searchsorted(row.top_p * shift * order.sum())
            kept &= weights >= order[min(number, len(order) - 1)] * (1 - 1e-6)
        cumulative = np.where(kept, weights, 0).cumsum()
        uniform = (np.random.Philox(key=row.seed % 2**64, counter=row.index).random_raw() >> 11) * 2.0**-53
        for target in (uniform * cumulative[-1] * (1 - 1e-6), uniform * cumulative[-1] * (1 + 1e-6)):
            place = int(cumulative.searchsorted(target, side="right"))
            results.add(min(place, int(cumulative.searchsorted(cumulative[-1]))))
    return results


def rows_of(rows: Sequence[Parameters], seats: Sequence[int], device: Device) -> SamplingRows:
    def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device.torch_device)

    return SamplingRows(
        temperature=tensor([row.temperature for row in rows], torch.float32),
        top_p=tensor([row.top_p for row in rows], torch.float32),
        min_p=tensor([row.min_p for row in rows], torch.float32),
        top_k=tensor([row.top_k for row in rows], torch.int32),
        seeds=torch.from_numpy(np.array([row.seed % 2**64 for row in rows], np.uint64).view(np.int64)).to(
            device.torch_device
        ),
        indices=tensor([row.index for row in rows], torch.int64),
        seats=tensor(seats, torch.int32),
    )


def random_logits(rng: np.random.Generator, rows: int, vocab_size: int, dtype: torch.dtype, device: Device) -> Tensor:
    """Steep enough that filters keep some tokens and leave some."""
    return torch.from_numpy(rng.standard_normal((rows, vocab_size), np.float32) * 3).to(device.torch_device, dtype)


def check_sample(
    device: Device, *, vocab_size: int, dtype: torch.dtype, threads: int, rows: Sequence[Parameters]
) -> None:
    logits = random_logits(np.random.default_rng(vocab_size), len(rows), vocab_size, dtype, device)
    sampler = DeviceSampler(device, dtype, vocab_size, num_threads=threads)
    token_ids = sampler.sample(logits, rows_of(rows, [-1] * len(rows), device)).tolist()
    for token_id, row_logits, row in zip(token_ids, exact(logits), rows, strict=True):
        expected = expected_tokens(row_logits, row)
        assert token_id in expected, f"{row}: token {token_id}, expected {expected}"


def check_ties(device: Device) -> None:
    """The lowest of equal tokens is the best; a filter keeps all that equal the last it keeps."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, -torch.inf]] * 12, device=device.torch_device)
    rows = [
        Parameters(temperature=0.0),
        Parameters(top_p=0.01),
        *[Parameters(top_k=3, seed=seed) for seed in range(10)],
    ]
    sampler = DeviceSampler(device, torch.float32, 6, num_threads=THREADS)
    token_ids = sampler.sample(logits, rows_of(rows, [-1] * len(rows), device)).tolist()
    assert token_ids[0] == 1 and token_ids[1] in (1, 3) and set(token_ids[2:]) <= {1, 2, 3, 4}, token_ids


def check_not_finite(device: Device) -> None:
    """No token where a logit is NaN, of either sign, or infinite, or where all are forbidden."""
    sound = [1.0, 3.0, -torch.inf, 2.0]
    rows = [
        sound,
        [1.0, torch.nan, 9.0, 2.0],
        [1.0, -torch.nan, 9.0, 2.0],
        [torch.inf, 3.0, 1.0, 2.0],
        [-torch.inf] * 4,
    ]
    logits = torch.tensor(rows, device=device.torch_device)
    logits[2, 1] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)
    sampler = DeviceSampler(device, torch.float32, 4, num_penalty_seats=5, num_threads=THREADS)
    sampler.count_tokens(
        *(
            torch.tensor(x, dtype=torch.int32, device=device.torch_device)
            for x in (range(5), [0], [0] * 5 + [1], [1] * 5)
        )
    )
    for temperature in (0.0, 1.0):
        token_ids = sampler.sample(logits, rows_of([Parameters(temperature)] * 5, range(5), device)).tolist()
        assert token_ids[1:] == [-1] * 4 and token_ids[0] in (0, 1, 3), token_ids


def check_adjusted(device: Device, *, vocab_size: int, dtype: torch.dtype) -> None:
    """Row 0 has penalties and a bias, row 1 is as it is, row 2 has a mask and biases, row 3 penalties alone; the second step
    stands behind drafts, which it counts and does not keep."""
    rng = np.random.default_rng(5)
    logits = random_logits(rng, 4, vocab_size, dtype, device)
    rows = [
        Parameters(temperature=0.0, repetition=1.4, frequency=0.3, presence=0.7),
        Parameters(seed=1),
        Parameters(temperature=0.7, seed=2),
        Parameters(temperature=0.0, repetition=0.6),
    ]
    prompts = {0: rng.integers(0, vocab_size, 9), 3: rng.integers(0, vocab_size, 4)}
    outputs = {0: rng.integers(0, vocab_size, 11), 3: rng.integers(0, vocab_size, 0)}
    drafts = {0: [5, 7, 5], 3: [int(prompts[3][0])]}
    allowed = rng.random(vocab_size) < 0.5
    allowed[3] = False
    biases = {0: {0: 2.5, int(vocab_size - 1): -1.0}, 2: {1: 4.0, 3: 9.0, 2: -np.inf}}
    places = [0, 2, 3]  # adjusted rows; row 0 has seat 1, row 3 seat 0
    seats = {0: 1, 2: -1, 3: 0}

    def tensor(values: Sequence[float], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device.torch_device)

    sampler = DeviceSampler(device, dtype, vocab_size, num_penalty_seats=2, num_threads=THREADS)
    for _ in range(2):  # what was counted before must not matter
        ends = np.cumsum([0, *[len(prompts[row]) + len(outputs[row]) for row in (0, 3)]]).tolist()
        tokens = np.concatenate([prompts[0], outputs[0], prompts[3], outputs[3]]).tolist()
        sampler.count_tokens(tensor([1, 0]), tensor(tokens), tensor(ends), tensor([len(prompts[0]), len(prompts[3])]))
    words = np.packbits(allowed, bitorder="little")
    mask = np.zeros(-(-vocab_size // 32) * 4, np.uint8)
    mask[: len(words)] = words
    adjustments = Adjustments(
        rows=tensor(places),
        adjusted_row=tensor([0, -1, 1, 2]),
        seats=tensor([seats[row] for row in places]),
        repetition=tensor([rows[row].repetition for row in places], torch.float32),
        frequency=tensor([rows[row].frequency for row in places], torch.float32),
        presence=tensor([rows[row].presence for row in places], torch.float32),
        allowed=torch.from_numpy(mask.view(np.int32)[None]).to(device.torch_device),
        masks=tensor([-1, 0, -1]),
        bias_offsets=tensor(np.cumsum([0, *[len(biases.get(row, {})) for row in places]]).tolist()),
        bias_tokens=tensor([token for row in places for token in biases.get(row, {})]),
        bias_values=tensor([value for row in places for value in biases.get(row, {}).values()], torch.float32),
    )
    behind_drafts = replace(
        adjustments,
        draft_offsets=tensor(np.cumsum([0, *[len(drafts.get(row, ())) for row in places]]).tolist()),
        draft_tokens=tensor([token for row in places for token in drafts.get(row, ())]),
    )
    for step in range(3):  # each sees what those before have sampled
        adjustments_now, drafted = (behind_drafts, drafts) if step == 1 else (adjustments, {})
        wanted = exact(logits)
        wanted[2, ~allowed] = -np.inf
        for number, of_row in biases.items():
            for token, value in of_row.items():
                wanted[number, token] += value
        for number in prompts:
            output = np.append(outputs[number], drafted.get(number, [])).astype(np.int64)
            wanted[number] = _penalised(wanted[number], prompts[number], output, rows[number])
        adjusted = exact(sampler.adjusted(logits, adjustments_now))
        assert (np.isneginf(adjusted) == np.isneginf(wanted[places])).all(), "other tokens are forbidden"
        assert_close(torch.from_numpy(np.maximum(adjusted, -99)), np.maximum(wanted[places], -99), 1e-5)
        token_ids = sampler.sample(logits, rows_of(rows, [1, -1, -1, 0], device), adjustments_now).tolist()
        for number, row in enumerate(rows):
            expected = expected_tokens(wanted[number], row)
            assert token_ids[number] in expected, f"step {step}, row {number}: {token_ids[number]}, expected {expected}"
            if number in outputs:
                outputs[number] = np.append(outputs[number], token_ids[number])


def _penalised(logits: Floats, prompt: NDArray[np.int64], output: NDArray[np.int64], row: Parameters) -> Floats:
    counts = np.bincount(output, minlength=len(logits))
    seen = (counts + np.bincount(prompt, minlength=len(logits))) > 0
    repeated = np.where(logits > 0, logits / row.repetition, logits * row.repetition)
    adjusted: Floats = np.where(seen, repeated, logits) - row.frequency * counts - row.presence * (counts > 0)
    return adjusted


def check_log_probabilities(device: Device, *, vocab_size: int, num_top: int, dtype: torch.dtype) -> None:
    logits = random_logits(np.random.default_rng(3), 3, vocab_size, dtype, device)
    token_ids = torch.tensor([0, vocab_size - 1, vocab_size // 2], dtype=torch.int32, device=device.torch_device)
    sampler = DeviceSampler(device, dtype, vocab_size, num_threads=THREADS)
    result = sampler.log_probabilities(logits, token_ids, num_top)
    numbers = exact(logits)
    expected = numbers - numbers.max(-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    assert_close(result.sampled, np.take_along_axis(expected, token_ids.cpu().numpy()[:, None], 1)[:, 0], 1e-4)
    order = np.argsort(-numbers, axis=-1, kind="stable")[:, :num_top]
    assert (result.top_ids.cpu().numpy() == order).all()
    assert_close(result.top, np.take_along_axis(expected, order, 1), 1e-4)


ROWS = [
    Parameters(temperature=0.0),
    Parameters(seed=2**64 - 1, index=7),
    Parameters(temperature=0.3, top_k=5, seed=11, index=2**31),
    Parameters(top_p=0.8, seed=12),
    Parameters(temperature=1.5, top_k=40, top_p=0.5, seed=13, index=3),
    Parameters(min_p=0.1, seed=14),
    Parameters(temperature=2.0, min_p=0.02, top_k=30, top_p=0.9, seed=15),
    Parameters(top_k=1, seed=16),
    Parameters(top_p=1e-9, seed=17),
    Parameters(temperature=5.0, seed=18),
    *[Parameters(temperature=9.0, top_k=1 + seed % 2, seed=seed) for seed in range(12)],
    *[Parameters(top_p=0.95, seed=seed, index=seed % 3) for seed in range(20, 32)],
]


def _cases() -> list[Case]:
    cases = [Case("sample: ties", KERNELS, check_ties), Case("sample: not finite", KERNELS, check_not_finite)]
    for vocab_size, dtype in ((1, torch.float32), (7, torch.float32), (1000, torch.bfloat16), (4099, torch.float16)):
        run = partial(check_sample, vocab_size=vocab_size, dtype=dtype, threads=THREADS, rows=ROWS)
        cases.append(Case(f"sample: vocabulary of {vocab_size}", KERNELS, run))
    run = partial(check_sample, vocab_size=50_257, dtype=torch.float32, threads=1024, rows=ROWS[4:7])
    cases.append(Case("sample: vocabulary of 50,257", KERNELS, run, small=False))
    for vocab_size in (40, 1003):
        run = partial(check_adjusted, vocab_size=vocab_size, dtype=torch.float32)
        cases.append(Case(f"adjust: vocabulary of {vocab_size}", KERNELS, run))
    for vocab_size, num_top in ((5, 5), (1003, 20)):
        for dtype in (torch.float32, torch.bfloat16):
            run = partial(check_log_probabilities, vocab_size=vocab_size, num_top=num_top, dtype=dtype)
            name = f"log_probabilities: {num_top} of {vocab_size}, {dtype}"
            cases.append(Case(name, frozenset({"log_probabilities"}), run))
    return cases


CASES = _cases()
