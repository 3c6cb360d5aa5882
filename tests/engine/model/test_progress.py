"""What is said of a long preparation: in the log, and to who listens."""

import logging

import pytest

from evenhand_engine.model.progress import Progress, Stage, listening


@pytest.fixture
def now() -> list[float]:
    return [0.0]


def test_stage_is_said_at_once_and_then_every_few_seconds(now: list[float]) -> None:
    said: list[str] = []
    with listening(said.append):
        stage = Stage("loading the weights", total=8, clock=lambda: now[0])
        assert said == ["loading the weights"]
        for second in range(1, 9):
            now[0] = float(second)
            stage.advance(1)
    assert said[1:] == ["loading the weights: 62 %"]
    stage.advance(1)
    Stage("after that", total=1)
    assert len(said) == 2, "nobody listens any more"


def test_total_that_is_not_known_has_no_percentage(now: list[float]) -> None:
    said: list[str] = []
    with listening(said.append):
        stage = Stage("fetching org/model", total=0, clock=lambda: now[0])
        now[0] = 10.0
        stage.advance(5)
        stage.reach(30, total=40)
        now[0] = 20.0
        stage.reach(50, total=40)  # more than was announced
    assert said == ["fetching org/model", "fetching org/model: 75 %", "fetching org/model: 100 %"]


def test_without_a_terminal_stages_are_log_records(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress() as progress:
        progress.stage("converting the weights", total=2)(1)
    assert [record.getMessage() for record in caplog.records] == ["converting the weights"]
