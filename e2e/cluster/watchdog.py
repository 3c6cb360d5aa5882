"""Kills what a test run leaves behind when it dies without a chance to clean up.

Reads lines from standard input: `+PID` starts watching a process group, `-PID` stops watching it. At the end of input,
which comes when whoever held the other end has gone for whatever reason, every group still watched is killed.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Runs until the end of input."""
    watched: set[int] = set()
    for line in sys.stdin:
        (watched.add if line[0] == "+" else watched.discard)(int(line[1:]))
    for group in watched:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
