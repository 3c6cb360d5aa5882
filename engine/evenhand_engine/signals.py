"""SIGTERM and SIGINT, which a terminal or a supervisor sends to a whole group of processes: the first one of them decides."""

import contextlib
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

ENDINGS = (signal.SIGTERM, signal.SIGINT)


def leave_at_once() -> None:
    """End the process quietly at either, while it has nothing to end: until an event loop takes them over."""
    for number in ENDINGS:
        signal.signal(number, lambda *_: os._exit(0))


@contextlib.contextmanager
def withheld() -> Iterator[None]:
    """Keep both from a process that is spawned here, also while it only begins: until it calls `leave_to_the_first`."""
    resource_tracker.ensure_running()  # spawned with the first process, it would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_the_first() -> None:
    """Ignore both: the process that spawned this one ends it."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
