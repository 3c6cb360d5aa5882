"""Traces are read whole or refused with the place of the error."""

from pathlib import Path

import pytest

from evenhand_engine.errors import StartupError
from evenhand_engine.simulator.traces import load_measured_run, load_trace

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "chat.csv"
    path.write_text(text)
    return path


def test_rows_are_sorted_by_arrival_and_the_file_names_the_tenant(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n2.5,7,8\n0.5,5,6\n"))
    assert [(r.tenant_id, r.arrival_time, r.num_prompt_tokens, r.num_output_tokens) for r in trace] == [
        ("chat", 0.5, 5, 6),
        ("chat", 2.5, 7, 8),
    ]


def test_tenant_and_user_columns_count(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, "tenant,user,arrival_s,prompt_tokens,output_tokens\na,u1,0,1,1\nb,,0,1,1\n"))
    assert [(r.tenant_id, r.user) for r in trace] == [("a", "u1"), ("b", "")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "column output_tokens is missing; needed are arrival_s, prompt_tokens"),
        (HEADER + "0,1,1\n0,x,1\n", r"chat\.csv, line 3: Expected `int`, got `str` - at `\$\.prompt_tokens`"),
        (HEADER + "0,0,1\n", "line 2: Expected `int` >= 1 - at `.*prompt_tokens"),
        (HEADER + "0,1,-3\n", "line 2: Expected `int` >= 1 - at `.*output_tokens"),
        (HEADER + "0,1,1.5\n", "line 2: Expected `int`.*output_tokens"),
        (HEADER + "0,99999999999,1\n", "line 2: Expected `int` <= 16777216"),
        (HEADER + "nan,1,1\n", "line 2: Expected `float` >= 0.0 - at `.*arrival_s"),
        (HEADER + "inf,1,1\n", "line 2: Expected `float` <= 1000000000.0"),
        (HEADER + "-1,1,1\n", "line 2: Expected `float` >= 0.0"),
        (HEADER + "0,1\n", "line 2: .*output_tokens"),
        (HEADER + '0,1,1\n0,"1', "line 3: unexpected end of data"),
        (HEADER, "no requests"),
        ("", "column arrival_s is missing"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        load_trace(write(tmp_path, text))


def test_a_missing_file_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"nowhere\.csv: cannot be read"):
        load_trace(tmp_path / "nowhere.csv")


def test_latencies_of_a_measured_run_count_from_the_arrival(tmp_path: Path) -> None:
    header = "tenant,arrival_s,prompt_tokens,output_tokens,first_token_latency_s,request_latency_s"
    (record,) = load_measured_run(write(tmp_path, f"{header}\na,10,5,6,1.5,4\n"))
    assert (record.first_token_time, record.finish_time, record.cost) == (11.5, 14.0, 17)
