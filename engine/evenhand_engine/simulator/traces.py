"""Trace: the requests of a simulated run, from a CSV file or made by a named workload."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from evenhand_engine.csv_rows import R, read_rows
from evenhand_engine.errors import StartupError
from evenhand_engine.simulator.measures import RequestRecord

Seconds = Annotated[float, Meta(ge=0, le=1e9)]  # refuses NaN and infinity too
TokenCount = Annotated[int, Meta(ge=1, le=2**24)]  # no context is longer


class _TraceRow(msgspec.Struct, frozen=True):
    arrival_s: Seconds
    prompt_tokens: TokenCount
    output_tokens: TokenCount
    tenant: str = ""
    user: str = ""


class _MeasuredRow(msgspec.Struct, frozen=True):
    arrival_s: Seconds
    prompt_tokens: TokenCount
    output_tokens: TokenCount
    first_token_latency_s: Seconds
    request_latency_s: Seconds
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request as its client sends it. The engine learns `num_output_tokens` only when the last token comes.

    Attributes:
        arrival_time: seconds from the start of the run.
        prefix: name of a text that the prompt starts with; prompts that name the same one share these tokens.
        num_prefix_tokens: how many tokens of the prompt that text is.
    """

    tenant_id: str
    arrival_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    user: str = ""
    prefix: str = ""
    num_prefix_tokens: int = 0


def load_trace(path: Path) -> list[TraceRequest]:
    """Read a trace, sorted by arrival.

    Columns: `arrival_s`, `prompt_tokens`, `output_tokens`, and optionally `tenant` (default: the file's name without
    its ending) and `user`; others are ignored.

    Raises:
        StartupError: no such file, a column is missing, or a value is not a number in range; names file and line.
    """
    requests = [
        TraceRequest(row.tenant or path.stem, row.arrival_s, row.prompt_tokens, row.output_tokens, row.user)
        for row in _requests_of(path, _TraceRow)
    ]
    return sorted(requests, key=lambda request: request.arrival_time)


def load_measured_run(path: Path) -> list[RequestRecord]:
    """Read a run that was measured on a real machine: a trace with `first_token_latency_s` and `request_latency_s`.

    Raises:
        StartupError: as `load_trace`.
    """
    return [
        RequestRecord(
            tenant_id=row.tenant or path.stem,
            arrival_time=row.arrival_s,
            num_prompt_tokens=row.prompt_tokens,
            num_output_tokens=row.output_tokens,
            first_token_time=row.arrival_s + row.first_token_latency_s,
            finish_time=row.arrival_s + row.request_latency_s,
        )
        for row in _requests_of(path, _MeasuredRow)
    ]


def _requests_of(path: Path, kind: type[R]) -> list[R]:
    rows = read_rows(path, kind)
    if not rows:
        raise StartupError(f"{path}: the trace has no requests")
    return rows
