"""The plan: every row meets every token that it sees exactly once, whatever the lengths, in few and even items. In numpy and compiled."""

import ctypes
import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evenhand_engine.model.cache import cache_dir
from evenhand_kernels.cpu.library import load_planner
from evenhand_kernels.cuda.native_plan import NativePlanner
from evenhand_kernels.cuda.plan import HEADER_WORDS, LEAST_TILES, TILE, Planner, Work
from evenhand_kernels.cuda.units import (
    BEGIN,
    DECODE_ROWS,
    END,
    FIRST_ROW,
    HEAD_ROWS,
    IS_PROMPT,
    NUM_PARTS,
    NUM_ROWS,
    PARTIAL_ROW,
    REQUEST,
    WORDS,
)

REQUESTS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000)), max_size=40)


def arrays(requests: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Of (new, past) tokens."""
    lens = np.array([new for new, _ in requests], np.int32)
    seq_lens = np.array([new + past for new, past in requests], np.int32)
    return seq_lens, np.concatenate(([0], lens.cumsum())).astype(np.int32)


def makespan(work: Work, num_kv_heads: int, num_slots: int) -> tuple[int, float]:
    """When the last of `num_slots` places is done if each takes the next item as it becomes free; and the average load."""
    loads = np.zeros(num_slots, np.int64)
    for item in work.items:
        for _ in range(num_kv_heads):
            loads[loads.argmin()] += -(-(item[END] - item[BEGIN]) // TILE)
    return int(loads.max()), float(loads.mean())


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    group=st.sampled_from([1, 3, 4, 7, 8, 32]),
    num_kv_heads=st.sampled_from([1, 2, 8]),
    num_slots=st.sampled_from([1, 8, 264]),
    window=st.sampled_from([None, 1, 100, 1000]),
)
def test_rows_meet_their_tokens_once(
    requests: list[tuple[int, int]], group: int, num_kv_heads: int, num_slots: int, window: int | None
) -> None:
    planner = Planner(num_kv_heads, group, prompt_rows=128, num_slots=num_slots)
    seq_lens, cu_seqlens_q = arrays(requests)
    work = planner.plan(seq_lens, cu_seqlens_q, window)

    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    partial_rows: set[int] = set()
    for item in work.items:
        assert 0 < item[NUM_ROWS] <= (128 if item[IS_PROMPT] else DECODE_ROWS)
        assert item[BEGIN] % 16 == 0 and item[BEGIN] < item[END] <= seq_lens[item[REQUEST]]
        seen.setdefault((item[REQUEST], item[FIRST_ROW]), []).append((item[BEGIN], item[END]))
        for head in range(num_kv_heads if item[PARTIAL_ROW] >= 0 else 0):
            first = item[PARTIAL_ROW] + head * item[HEAD_ROWS]
            rows = set(range(first, first + item[NUM_ROWS]))
            assert not rows & partial_rows and first + item[NUM_ROWS] <= planner.max_partial_rows
            partial_rows |= rows

    for request, (new, past) in enumerate(requests):
        starts = [first_row for owner, first_row in seen if owner == request]
        assert sorted(starts) == list(range(0, new * group, 128))
        for first_row in starts:
            parts = sorted(seen[request, first_row])
            last_row = min(first_row + 128, new * group) - 1
            assert parts[-1][1] == past + last_row // group + 1
            first_token = 0 if window is None else max(0, past + first_row // group - window + 1)
            assert first_token - 16 < parts[0][0] <= first_token
            for (begin, end), (next_begin, _) in itertools.pairwise(parts):
                assert end == next_begin and (end - begin) % TILE == 0

    splits = {key: len(parts) for key, parts in seen.items() if len(parts) > 1}
    assert {(merge[REQUEST], merge[FIRST_ROW]): merge[NUM_PARTS] for merge in work.merges} == splits
    capacity = planner.capacity(len(requests), int(cu_seqlens_q[-1]))
    assert len(work.items) <= capacity.items and len(work.merges) <= capacity.merges


def test_the_words_are_what_the_kernels_read() -> None:
    planner = Planner(2, 4, prompt_rows=128, num_slots=8)
    step = arrays([(1, 3000), (1, 5), (40, 0)])
    work, capacity = planner.plan(*step), planner.capacity(3, 42)
    words = np.full(capacity.words, -1, np.int32)
    planner.write(words, capacity, *step)
    assert words[:2].tolist() == [len(work.items), len(work.merges)] and len(work.merges) == 1
    assert (words[HEADER_WORDS:].reshape(-1, WORDS)[: len(work.items)] == work.items).all()
    assert (words[HEADER_WORDS + capacity.items * WORDS :].reshape(-1, WORDS)[:1] == work.merges).all()


@pytest.mark.parametrize(
    "requests, parts, idle",
    [
        ([(1, 4095)] * 32, 1, 0.04),  # nearly a wave: splitting would only cost merges
        ([(1, 1023)] * 256, 1, 0.04),
        ([(1, 4095)] * 40, 4, 0.04),  # whole, they would take two waves
        ([(1, 27_999), *[(1, 200)] * 31], 25, 0.2),
        ([(1, 99_999)], 33, 0.02),
        ([(256, 28_000)], 4, 0.04),
    ],
)
def test_splits_are_few_and_even(requests: list[tuple[int, int]], parts: int, idle: float) -> None:
    planner = Planner(8, 4, prompt_rows=128, num_slots=264)
    work = planner.plan(*arrays(requests))
    assert max((int(merge[NUM_PARTS]) for merge in work.merges), default=1) == parts
    longest, average = makespan(work, 8, 264)
    assert 1 - average / longest <= idle


def test_short_units_are_never_split() -> None:
    planner = Planner(1, 1, prompt_rows=128, num_slots=1000)
    work = planner.plan(*arrays([(1, LEAST_TILES * TILE - 1), (1, 3 * LEAST_TILES * TILE - 1)]))
    assert [int(merge[NUM_PARTS]) for merge in work.merges] == [3]


def test_a_step_of_nothing(library: ctypes.CDLL) -> None:
    planner = Planner(8, 4, 128, 264)
    work = planner.plan(*arrays([]))
    assert len(work.items) == 0 and len(work.merges) == 0
    assert written(NativePlanner(library, planner), planner, [], None)[:2].tolist() == [0, 0]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if not any(map(shutil.which, ("g++", "c++"))):
        pytest.skip("no C++ compiler")
    return load_planner(cache_dir() / "kernels")


def written(
    writer: Planner | NativePlanner, planner: Planner, requests: list[tuple[int, int]], window: int | None
) -> np.ndarray:
    """The words of a step, and some behind them that nobody may write to."""
    seq_lens, cu_seqlens_q = arrays(requests)
    capacity = planner.capacity(len(requests), int(cu_seqlens_q[-1]))
    words = np.full(capacity.words + 64, -7, np.int32)
    counts = writer.write(words, capacity, seq_lens, cu_seqlens_q, window)
    assert words[:2].tolist() == [*counts]
    return words


STEPS = st.one_of(
    REQUESTS,
    st.lists(st.tuples(st.just(1), st.one_of(st.integers(0, 100), st.integers(0, 100_000))), max_size=300),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20_000)), max_size=60),
)


@settings(max_examples=400, deadline=None)
@given(
    requests=STEPS,
    group=st.sampled_from([1, 3, 4, 7, 8, 17, 130]),
    num_kv_heads=st.sampled_from([1, 2, 8]),
    prompt_rows=st.sampled_from([64, 128]),
    num_slots=st.sampled_from([1, 8, 80, 264]),
    window=st.sampled_from([None, 1, 100, 9000]),
)
def test_compiled_code_plans_the_same(
    library: ctypes.CDLL,
    requests: list[tuple[int, int]],
    group: int,
    num_kv_heads: int,
    prompt_rows: int,
    num_slots: int,
    window: int | None,
) -> None:
    planner = Planner(num_kv_heads, group, prompt_rows, num_slots)
    native = NativePlanner(library, planner)
    for step in (requests, requests[::2]):  # the second in the memory that the first has left
        assert (written(native, planner, step, window) == written(planner, planner, step, window)).all()


def test_compiled_code_splits_as_often(library: ctypes.CDLL) -> None:
    """The steps that a benchmark times, of which the examples above may have none."""
    planner = Planner(8, 4, prompt_rows=128, num_slots=264)
    native, rng = NativePlanner(library, planner), np.random.default_rng(0)
    splits = 0
    for _ in range(200):
        long = int(rng.choice([4000, 8000, 28_000]))
        requests = [(1, int(past)) for past in rng.integers(1, long, rng.integers(1, 257))]
        requests += [(int(rng.integers(1, 300)), long)]
        words = written(planner, planner, requests, None)
        assert (written(native, planner, requests, None) == words).all()
        splits += int(words[1] > 0)
    assert splits > 50
