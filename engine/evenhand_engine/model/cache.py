"""Files that can be made again (converted models, compiled kernels): below the user's cache folder, made once.

An entry is a directory that appears complete or not at all, whatever is killed, and that only one process builds.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHIPPED_DIR = Path(sys.prefix, "share/evenhand")
"""What an installation brings ready made, as a container image does; laid out as `cache_dir()`, and only read."""


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/evenhand`, or `~/.cache/evenhand`; not necessarily there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenhand"


def cached(directory: Path, build: Callable[[Path], None]) -> Path:
    """`directory`; if it is missing, `build` fills a temporary one, which then takes its name in one step."""
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(directory.name + ".lock")):
        if not directory.is_dir():  # else another process built it meanwhile
            partial = directory.with_name(directory.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
            partial.mkdir()
            build(partial)
            partial.rename(directory)
    return directory


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file, which the kernel frees even when the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
