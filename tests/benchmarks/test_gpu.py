"""`make gpu`, rehearsed: every part that a GPU will run is run here on the emulated device, with tiny sizes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from evenhand_kernels.checks.case import Case

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("cases", "parity", "kernels", "engine-1b", "incident")
NOT_THERE = ("click", "jwt", "kopf", "llguidance", "matplotlib", "prometheus_client", "tenacity", "watchfiles")
"""Of the project's packages: neither on a machine that has torch, CuPy and transformers, nor among `make gpu-wheels`."""


def hiding(directory: Path, *packages: str) -> str:
    """A PYTHONPATH with which these cannot be imported."""
    for package in packages:
        (directory / f"{package}.py").write_text(f"raise ImportError('no {package} here')")
    return f"{directory}:{os.environ.get('PYTHONPATH', '')}"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1700, env=os.environ | environment)


@pytest.mark.timeout(1800)  # where nothing is compiled yet, much is
def test_every_part_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    """With the packages of such a machine alone."""
    only = [word for part in PARTS for word in ("--only", part)]
    done = run("--device", "emulated", "--out", str(tmp_path), *only, PYTHONPATH=hiding(tmp_path, *NOT_THERE))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "emulated.json").read_text())
    assert figures == json.loads(done.stdout.splitlines()[-1])
    assert list(figures["parts"]) == list(PARTS)
    assert figures["cases"]["cases"] > 5 and not figures["cases"]["failed"]
    assert figures["parity"]["tokens"] > 0 == figures["parity"]["wrong"]
    assert figures["prefill"]["max_difference"] < 0.05
    assert set(figures["prefill"]["tflops_by_variant"]) == {"mma.sync", "wgmma"}
    assert figures["transformers_1b"]["finished"] == figures["throughput_1b"]["requests"]
    assert {"decode", "memory", "incident_fcfs", "batching", "long_prompt"} <= set(figures)
    assert "--plot emulated.json" in done.stderr and not (tmp_path / "emulated.png").exists()
    assert run("--plot", str(tmp_path / "emulated.json")).returncode == 0
    assert (tmp_path / "emulated.png").stat().st_size > 10_000


def test_a_part_that_fails_costs_no_other_its_figures(tmp_path: Path) -> None:
    """The kernels cannot be compiled: no case ends well, nor the part that needs them, and what is known is written all the same."""
    done = run(
        *("--device", "emulated", "--out", str(tmp_path), "--only", "cases", "--only", "kernels"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        CXX="/bin/false",
    )
    assert done.returncode == 1
    figures = json.loads((tmp_path / "emulated.json").read_text())
    assert len(figures["cases"]["failed"]) == figures["cases"]["cases"] > 5
    assert "exit status 1" in figures["parts"]["kernels"]["problem"]


class Died(BaseException):
    """Of a process, what its pool turns into an error."""


def outcomes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ends: dict[str, BaseException]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Of the cases a to e, some of which end so: which have run, and what was told after each."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    correctness, options = import_module("gpu_correctness"), import_module("gpu_common").Options("emulated", 0)
    has_run: list[str] = []

    def case(name: str) -> Case:
        def run(_: object) -> None:
            has_run.append(name)
            if name in ends:
                raise ends[name]

        return Case(name, frozenset({name}), run)

    class Processes(ThreadPoolExecutor):
        """One after the other, each as if it were a process."""

        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(1)
            correctness._lost.clear()

        def map(self, *arguments: Any) -> Iterator[Any]:  # type: ignore[override]
            try:
                yield from map(*arguments)
            except Died as death:
                raise BrokenProcessPool from death

    monkeypatch.setattr(correctness, "CASES", [case(name) for name in "abcde"])
    monkeypatch.setattr(correctness, "ProcessPoolExecutor", Processes)
    correctness.tell("cases", correctness.outcomes_of_all(options, list(range(5))))
    return has_run, [json.loads(line)["cases"] for line in capsys.readouterr().out.splitlines()]


def test_a_case_that_costs_a_process_its_device_fails_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an illegal address does on a GPU: what that process has left is run by another, and each case is told of once."""
    has_run, told = outcomes(monkeypatch, capsys, {"b": AssertionError("off"), "c": RuntimeError("illegal")})
    assert [each["cases"] for each in told] == [1, 2, 3, 4, 5] and has_run == ["a", "b", "c", "d", "e"]
    assert told[-1]["failed"] == ["b: off", "c: RuntimeError: illegal"]


def test_a_case_that_ends_its_process_is_found_and_fails_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose end is that of all processes: which of them it was is seen when one alone runs what is left."""
    has_run, told = outcomes(monkeypatch, capsys, {"b": RuntimeError("illegal"), "d": Died()})
    assert has_run == ["a", "b", "c", "d", "d", "e"]
    assert [each["cases"] for each in told] == [1, 2, 3, 4, 5]
    assert told[-1]["failed"] == ["b: RuntimeError: illegal", "d: its process died"]


def test_idle_is_what_no_kernel_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    idle_part = import_module("gpu_engine").idle_part
    assert idle_part([(0, 4), (3, 6), (8, 10), (8, 9)]) == pytest.approx(0.2)
    assert idle_part([(5, 6)]) == 0


@pytest.mark.parametrize("hidden", ["cupy", "msgspec"])
def test_a_machine_that_lacks_something_is_told_what(tmp_path: Path, hidden: str) -> None:
    done = run(PYTHONPATH=hiding(tmp_path, hidden))
    assert done.returncode == 1
    assert done.stderr.startswith("make gpu: ") and f"no {hidden} here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
