"""The benchmarks that need no model: each runs in its small version, and what it claims holds there too."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def results_of(name: str, *arguments: str) -> dict[str, Any]:
    """The JSON object on the last line of a benchmark's output."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == name
    return found["results"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def static() -> dict[str, Any]:
    return results_of("static", "--simulated")


def test_with_equal_slots_continuous_batching_gains_no_more_than_longest_over_mean(static: dict[str, Any]) -> None:
    found = static["simulated_equal_slots"]
    assert 1.1 < found["gain"] < found["bound"]
    assert found["static"]["running"] < found["continuous"]["running"] <= found["slots"]


@pytest.mark.parametrize("lengths", ["simulated_equal_memory", "simulated_equal_memory_first_turns"])
def test_with_equal_memory_paging_gains_beyond_scheduling(static: dict[str, Any], lengths: str) -> None:
    found = static[lengths]
    assert found["gain"] == pytest.approx(found["scheduling"] * found["paging"])
    assert 1.0 < found["scheduling"] < found["scheduling_bound"] < found["paging"]
    assert found["reserved"]["running"] <= found["slots"] < found["paged"]["running"]


def test_the_front_end_loses_no_token() -> None:
    """It asserts so itself; here it is shown to run, and to count what one core can write."""
    found = results_of("frontend")
    assert found["tokens_per_s_per_core"] > 1000
    assert 0 < found["parts"]["calm"]["added_p50_ms"] <= found["added_p99_ms"]


def test_with_a_price_of_context_long_contexts_get_no_more_time_than_short_ones() -> None:
    found = results_of("context_price")
    assert found["0"]["long_share"] > 0.8
    assert found["suggested"]["long_share"] == pytest.approx(0.5, rel=0.1)


def test_the_hosts_part_of_a_decode_step_is_told_by_batch_size() -> None:
    found = results_of("host_step")
    assert list(found["host_step_ms"]) == list(found["planning_us"]) == ["1", "8", "32", "64", "128", "256"]
    assert min(found["host_step_ms"].values()) > 0
    assert min(found["planning_us_by_lengths"].values()) > 0
