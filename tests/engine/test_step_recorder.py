"""A recorded run survives whatever ends the engine, and is read back as it was."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from evenhand_engine.core.step_recorder import StepRecorder, load_steps, load_token_budgets
from evenhand_engine.errors import StartupError
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest
from evenhand_engine.scheduler.step_time import StepShape

HEADER = "prefill_tokens,decode_tokens,prefill_context,decode_context,seconds\n"
RECORD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.core.step_recorder import StepRecorder

with StepRecorder(Path(sys.argv[1])) as recorder:
    for step in range(100):
        recorder.record(Batch(step, ()), 0.001 * step)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_steps_come_back_as_they_were_recorded(tmp_path: Path) -> None:
    chunk, decode = ScheduledRequest(1, 16, 20, 0), ScheduledRequest(0, 39, 1, 1)
    with StepRecorder(tmp_path / "steps.csv") as recorder:
        for seconds in range(8):
            recorder.record(Batch(seconds, (decode, decode, chunk), num_decodes=2), seconds / 8)
    shapes, times = load_steps(tmp_path / "steps.csv")
    assert shapes == [StepShape(20, 2, 16, 78, 20 * 16 + 20 * 21 // 2)] * 8
    assert times == [seconds / 8 for seconds in range(8)]


def test_a_killed_engine_leaves_every_finished_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    done = subprocess.run([sys.executable, "-c", RECORD_AND_DIE, str(path)], timeout=280)
    assert done.returncode == -9
    _, seconds = load_steps(path)
    assert seconds == pytest.approx([0.001 * step for step in range(100)])


def test_a_row_that_was_never_finished_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(HEADER + "1,2,3,4,0.5\n" * 9 + "1,2,3,4,0.1")  # of 0.123, perhaps
    assert load_steps(path)[1] == [0.5] * 9


def test_a_replay_begins_anew_after_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(HEADER + "".join(f"{prefill},1,3,4,0.5\n" for prefill in range(8)))
    assert list(itertools.islice(load_token_budgets(path), 10)) == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]


def test_a_step_without_tokens_cannot_be_replayed(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(HEADER + "1,2,3,4,0.5\n" * 8 + "0,0,0,0,0.5\n")
    with pytest.raises(StartupError, match="step 9 has no tokens"):
        load_token_budgets(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "1,2,3,4,0.5\n" * 7, "7 steps are too few for a fit; record at least 8"),
        (HEADER + "1,2,3,4,0.5\n" * 8 + "1,2,3,4,nan\n", r"line 10: .*seconds"),
        (HEADER + "1,-2,3,4,0.5\n", r"line 2: Expected `int` >= 0 - at `\$\.decode_tokens`"),
        (HEADER.replace("seconds", "time"), "column seconds is missing"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(text)
    with pytest.raises(StartupError, match=message):
        load_steps(path)


def test_a_place_that_cannot_be_written_is_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"nowhere/steps\.csv: steps cannot be recorded: No such file"):
        StepRecorder(tmp_path / "nowhere" / "steps.csv")
