"""Trace: the requests of a simulated run, from a CSV file or made by a named workload."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evenhand_engine.errors import StartupError
from evenhand_engine.fairness import RequestRecord

T = TypeVar("T")


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
    rows = _rows(path, ("arrival_s", "prompt_tokens", "output_tokens"), lambda row: _trace_request(row, path.stem))
    return sorted(rows, key=lambda request: request.arrival_time)


def load_measured_run(path: Path) -> list[RequestRecord]:
    """Read a run that was measured on a real machine: a trace with `first_token_latency_s` and `request_latency_s`.

    Raises:
        StartupError: as `load_trace`.
    """
    required = ("arrival_s", "prompt_tokens", "output_tokens", "first_token_latency_s", "request_latency_s")
    return _rows(path, required, lambda row: _measured_request(row, path.stem))


def _trace_request(row: dict[str, str], default_tenant: str) -> TraceRequest:
    request = TraceRequest(
        tenant_id=row.get("tenant") or default_tenant,
        arrival_time=float(row["arrival_s"]),
        num_prompt_tokens=int(row["prompt_tokens"]),
        num_output_tokens=int(row["output_tokens"]),
        user=row.get("user") or "",
    )
    if not 0 <= request.arrival_time < float("inf"):
        raise ValueError("arrival_s must be a time from 0 on")
    if request.num_prompt_tokens < 1 or request.num_output_tokens < 1:
        raise ValueError("prompt_tokens and output_tokens must be at least 1")
    return request


def _measured_request(row: dict[str, str], default_tenant: str) -> RequestRecord:
    asked = _trace_request(row, default_tenant)
    return RequestRecord(
        tenant_id=asked.tenant_id,
        arrival_time=asked.arrival_time,
        num_prompt_tokens=asked.num_prompt_tokens,
        num_output_tokens=asked.num_output_tokens,
        first_token_time=asked.arrival_time + float(row["first_token_latency_s"]),
        finish_time=asked.arrival_time + float(row["request_latency_s"]),
    )


def _rows(path: Path, required: Sequence[str], parse: Callable[[dict[str, str]], T]) -> list[T]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in required if name not in (reader.fieldnames or ())]
            if missing:
                raise StartupError(f"{path}: column {missing[0]} is missing; a trace needs {', '.join(required)}")
            parsed = []
            for row in reader:
                try:
                    parsed.append(parse(row))
                except (TypeError, ValueError) as error:
                    raise StartupError(f"{path}, line {reader.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path}: cannot be read: {error}") from error
    if not parsed:
        raise StartupError(f"{path}: the trace has no requests")
    return parsed
