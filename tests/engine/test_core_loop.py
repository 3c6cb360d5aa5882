"""The core's loop: what floods it with commands delays no step, and its books are looked at in idle moments."""

import gc
import time
from array import array
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import cast

import pytest

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.connections import Connections
from evenhand_engine.core.engine import EngineCore
from evenhand_engine.messages import AbortRequest, AddRequest
from evenhand_engine.scheduler.batch import Runner
from evenhand_engine.scheduler.request import FinishReason, SamplingParams

NUM_QUEUED = 60_000


@pytest.fixture(autouse=True)
def without_collections() -> Iterator[None]:
    """As in the core process."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def core() -> EngineCore:
    """A core whose runner computes nothing yet, and whose messages go nowhere."""
    runner = cast(Runner, SimpleNamespace(pipeline_depth=2, submit=lambda batch: None))
    connection = cast(Connection, SimpleNamespace(send_bytes=lambda message: None))
    return EngineCore(SchedulerSettings(max_num_seqs=1), runner, Connections(connection))


def add(number: int) -> AddRequest:
    params = SamplingParams(max_tokens=4)
    return AddRequest(
        request_id=f"{number}",
        tenant_id="a",
        prompt_token_ids=array("I", [1]).tobytes(),
        sampling_params=params,
        arrival_time=0.0,
    )


def late(core: EngineCore) -> Iterator[float]:
    """By how many seconds, computed by this thread alone, commands delay each step until all are taken in."""
    while not core._commands.empty():
        before = time.thread_time()
        core._execute_commands()
        yield time.thread_time() - before


def test_no_step_is_late_when_sixty_thousand_are_queued_and_aborted_newest_first() -> None:
    busy = core()
    busy._is_stuck = False
    for number in range(NUM_QUEUED):
        busy._commands.put(add(number))
    assert max(late(busy)) < 0.02
    for number in reversed(range(NUM_QUEUED)):
        busy._commands.put(AbortRequest(request_id=f"{number}", reason=FinishReason.ABORT))
    assert max(late(busy)) < 0.02
    assert not busy._scheduler.request_table.requests


def test_the_books_are_looked_at_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    idle, now = core(), [1000.0]
    monkeypatch.setattr("evenhand_engine.core.engine.time", SimpleNamespace(monotonic=lambda: now[0]))
    idle._commands.put(AbortRequest(request_id="unknown", reason=FinishReason.ABORT))
    idle._execute_commands()
    idle._scheduler.request_table.capacity.take_seat()
    now[0] += 59.0
    idle._commands.put(AbortRequest(request_id="unknown", reason=FinishReason.ABORT))
    idle._execute_commands()
    now[0] += 2.0
    with pytest.raises(AssertionError):
        idle._execute_commands()
