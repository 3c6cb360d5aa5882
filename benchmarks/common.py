"""What the benchmarks share: arguments, the machine's line, tables, and the closing JSON object."""

import argparse
import contextlib
import json
import os
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

DATA = Path(__file__).parent / "data"

console = Console(width=120, highlight=False)


def arguments(summary: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: `--quick` for CI, `--seed`."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--quick", action="store_true", help="a small version for CI; its figures are not to be quoted")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def machine() -> str:
    """One line about this machine: processor, cores, system, Python."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {platform.system()}, Python {platform.python_version()}"


@contextlib.contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """This thread, and what it starts meanwhile, run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people; the first column is text, the others are numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}")  # a title of the table's own would wrap at its width
    console.print(table)


def finish(name: str, results: dict[str, Any]) -> None:
    """Print the JSON object that ends every benchmark, alone on the last line."""
    print(json.dumps({"benchmark": name, "machine": machine(), "results": results}, default=_plain))


def _plain(value: Any) -> Any:
    to_python: Callable[[], Any] | None = getattr(value, "item", None)  # numpy's numbers
    if to_python is None:
        raise TypeError(f"{type(value).__name__} is not JSON")
    return to_python()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
