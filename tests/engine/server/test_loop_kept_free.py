"""What the interpreter does beside a server's loop is kept from it."""

import gc
import sys
from collections.abc import Iterator

import pytest

from evenhand_engine.server.tasks import keep_loop_free


@pytest.fixture
def interpreter() -> Iterator[None]:
    """As it was before, for the tests that follow."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)
    gc.unfreeze()


def test_a_step_of_a_thousand_streams_sets_off_no_search_for_garbage(interpreter: None) -> None:
    keep_loop_free()
    before = [generation["collections"] for generation in gc.get_stats()]
    step = [[number] for number in range(5_000)]
    assert [generation["collections"] for generation in gc.get_stats()] == before
    del step


def test_a_thread_hands_over_soon(interpreter: None) -> None:
    keep_loop_free()
    assert sys.getswitchinterval() <= 0.001
