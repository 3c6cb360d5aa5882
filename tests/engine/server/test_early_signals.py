"""Signals to `evenhand serve` or `sidecar` while it, or a process that it has spawned, only begins."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from .processes import STOP_SECONDS

ENDINGS = [signal.SIGTERM, signal.SIGINT]
HALT = "import os, sys\nif {when}:\n    os.write(1, b'{name}')\n    os.read(0, 1)\n"
"""Tells that it has come here, and waits."""


@pytest.fixture
def begin(tmp_path: Path) -> Iterator["Begin"]:
    began = Begin(tmp_path)
    yield began
    began.end()


class Begin:
    """Starts the command in a group of its own, so that it waits where a module of that name is imported."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, command: list[str], module: str, when: str = "True") -> "subprocess.Popen[bytes]":
        (self._directory / f"{module}.py").write_text(HALT.format(when=when, name=module))
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("evenhand")), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(self._directory)},
            start_new_session=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.read(len(module)) == module.encode()
        return process

    def end(self) -> None:
        for process in self._processes:
            members = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for member in (*members, process):
                member.kill()
            process.communicate()


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize(
    "command", [["serve"], ["sidecar", "--upstream", "http://127.0.0.1:1"]], ids=lambda each: each[0]
)
@pytest.mark.parametrize("module", ["click", "uvloop"])
def test_while_the_command_is_imported(begin: Begin, command: list[str], module: str, number: signal.Signals) -> None:
    process = begin(command, module)
    process.send_signal(number)
    _, said = process.communicate(timeout=STOP_SECONDS)
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize("number", ENDINGS)
def test_while_the_core_begins(begin: Begin, model_dir: Path, number: signal.Signals) -> None:
    """As by Ctrl-C: the whole group has it, and the core has not come to its first own line."""
    serve = ["serve", str(model_dir), "--load-format", "dummy", "--port", "0", "--admin-port", "0"]
    process = begin(serve, "sitecustomize", when="'--multiprocessing-fork' in sys.orig_argv")
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=STOP_SECONDS)
    assert (process.returncode, said) == (0, b"")


@pytest.mark.parametrize("number", ENDINGS)
def test_other_commands_are_ended_as_any(begin: Begin, number: signal.Signals) -> None:
    process = begin(["lint", "."], "click")
    process.send_signal(number)
    process.communicate(timeout=STOP_SECONDS)
    assert process.returncode != 0
