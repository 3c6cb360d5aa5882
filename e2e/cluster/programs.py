"""Programs that a test run starts, each in a process group of its own, and always stops.

Output goes to a file and input is closed: a caller that waits for a pipe would otherwise wait for what is still running.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from cluster import watchdog


class ProgramDied(Exception):
    """A program ended although it should be running; the message has the end of its output."""


class Watchdog:
    """Ends the programs when this process dies, be it by SIGKILL. Owns the watching process.

    Unlike PR_SET_PDEATHSIG it does not care which thread started a program or whether that thread still lives.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", watchdog.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """Stops watching; what is still watched is killed."""
        self._process.communicate()

    def watch(self, group: int) -> None:
        """From now on `group` is killed with this process."""
        self._tell(f"+{group}")

    def unwatch(self, group: int) -> None:
        """`group` has ended: its number may soon be another's."""
        self._tell(f"-{group}")

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        os.write(self._process.stdin.fileno(), f"{line}\n".encode())  # short, so whole whichever thread writes it


class Running(ABC):
    """What runs while it is entered; of a start that fails, too, nothing is left."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Program:
    """One program: the command, where its output goes, and the process while it runs."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        watchdog: Watchdog,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = command
        self.log = log
        self._environment = environment
        self._watchdog = watchdog
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group. Raises ProgramDied."""
        self.check_running()
        assert self._process
        return self._process.pid

    def start(self) -> None:
        """Starts it; output is appended to `log`."""
        assert self._process is None, f"{self.name} runs already"
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._watchdog.watch(self._process.pid)

    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        return self._process.poll() if self._process else None

    def check_running(self) -> None:
        """Raises ProgramDied unless it runs."""
        if self._process is None or self._process.poll() is not None:
            status = "is not started" if self._process is None else f"ended with {self._process.returncode}"
            raise ProgramDied(f"{self.name} {status}; the end of {self.log}:\n{tail(self.log)}")

    def stop(self, grace: float = 10) -> None:
        """SIGTERM, then SIGKILL to the whole group after `grace` seconds (0: at once). Nothing if it does not run."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            if grace:
                process.terminate()
                process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._watchdog.unwatch(process.pid)

    def wait_until_ready(self, is_ready: Callable[[], bool], timeout: float = 180) -> None:
        """Returns once `is_ready()` is true. Raises ProgramDied, or TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not is_ready():
            self.check_running()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.name} is not ready after {timeout} s; the end of {self.log}:\n{tail(self.log)}"
                )
            time.sleep(0.05)


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a file, or nothing where there is none."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""
