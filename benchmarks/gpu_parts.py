"""The parts of `make gpu`: each a process with its own time limit, whose figures are kept whatever becomes of it.

A part may fail, hang, be killed, print what is no figure, or leave processes behind. What it tells goes to memory and not to a disk, which
may be full.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent
SECONDS_TO_DIE = 10.0
"""Of a killed process: longer than a driver needs to take its memory back, unless it hangs."""
MOST_REPORTED = 30


class Stopped(Exception):
    """Somebody asks this program to end."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        figures: what it must have told when it ends well.
        program: comes before the interpreter; None: it is not on this machine, and the part is left out.
        proof: what that program says if it did its work.
        marker: begins what the program has to say.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    figures: tuple[str, ...]
    program: tuple[str, ...] | None = ()
    proof: str = ""
    marker: str = "\0"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Ended:
    """How a part ended: `problem` None is well. `report`: what its program said, if it is one with a marker."""

    seconds: float
    problem: str | None
    figures: dict[str, Any] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)
    stopped: bool = False


def run(part: Part, options: tuple[str, ...], limit: float) -> Ended:
    """Start it and gather its figures until it ends, its time is up, or this program is told to stop."""
    if part.program is None:
        return Ended(0.0, None, {f"{part.name}_left_out": "its program is not on this machine"})
    if limit <= 0:
        return Ended(0.0, "no time was left for it")
    script, *arguments = part.arguments
    command = [*part.program, sys.executable, str(HERE / script), *arguments, *options]
    started_at = time.monotonic()
    with _memory() as out, _memory() as log:
        problem, stopped = None, False
        try:
            problem = _wait(command, limit, out, log, os.environ | part.environment)
        except Stopped:
            problem, stopped = "stopped from outside", True
        seconds = time.monotonic() - started_at
        output = _text(out)
        ended = Ended(seconds, problem, figures_of(output), stopped=stopped)
        ended.report = [line for line in output.splitlines() if line.startswith(part.marker)][:MOST_REPORTED]
        ended.problem = problem if stopped else _problem(part, ended, output, _text(log))
    return ended


def _wait(command: list[str], limit: float, out: TextIO, log: TextIO, environment: Mapping[str, str]) -> str | None:
    """What was wrong with its end. Nothing that it has started is left, since that may hold the device too."""
    try:
        process = subprocess.Popen(
            command, stdout=out, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=environment
        )
    except OSError as error:
        return f"it does not start: {error}"
    try:
        status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"its {limit:.0f} s were up"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_TO_DIE)
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else None


def _problem(part: Part, ended: Ended, output: str, log: str) -> str | None:
    """In one line."""
    said = next((line for line in ended.report if re.search(r"Invalid|Error|hazard|Uninit|Misaligned", line)), "")
    if ended.problem is not None:
        return f"{ended.problem}: {said or _last_line(log)}"
    missing = [name for name in part.figures if name not in ended.figures]
    if missing:
        return f"it ended without a word of {', '.join(missing)}: {_last_line(log)}"
    if part.proof not in output:
        return f"{Path((part.program or ('it',))[0]).name} has watched nothing: {said or 'no summary'}"
    return None


def figures_of(output: str) -> dict[str, Any]:
    """The lines that are JSON objects, as one; a line cut off by the time limit is none. What is no number is None."""
    figures: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(line, parse_constant=lambda _: None)
                figures |= found if isinstance(found, dict) else {}
    return figures


def write(path: Path, figures: dict[str, Any]) -> str | None:
    """What is in the way, if anything is: then the file stays as it was."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        return f"{path}: results cannot be written: {error.strerror}"
    return None


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise Stopped."""

    def stop(*_: object) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _memory() -> TextIO:
    return os.fdopen(os.memfd_create("output"), "w+", encoding="utf-8", errors="replace")


def _text(file: TextIO) -> str:
    file.seek(0)
    return file.read()


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no message")
