"""watch_directory: tells when the files of a directory may have changed, without polling."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import watchfiles

log = logging.getLogger(__name__)

_QUIET_MS = 50  # a burst of changes has ended after so long without one ...
_BURST_MS = 400  # ... or is taken as it is
_RETRY_SECONDS = 5.0


async def watch_directory(directory: Path, changed: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled, await `changed` once the watch stands, so that nothing is missed, and after each burst of changes.

    A mounted ConfigMap or Secret works too, and so does a directory that is replaced as a whole or not there for a while.
    """
    directory = directory.absolute()
    while True:
        try:
            await _watch(directory, changed)
        except (OSError, RuntimeError) as error:  # such as too many inotify watches
            fields = {"directory": directory, "error": error, "retry": _RETRY_SECONDS}
            log.warning("a directory is not watched", extra={"fields": fields})
            await asyncio.sleep(_RETRY_SECONDS)


async def _watch(directory: Path, changed: Callable[[], Awaitable[None]]) -> None:
    """The parent is watched too: it tells that the directory itself was replaced; then this returns, to begin anew."""
    changes = watchfiles.awatch(
        *(path for path in (directory, directory.parent) if path.is_dir()),
        watch_filter=lambda _, path: directory in (Path(path), Path(path).parent),
        recursive=False,
        step=_QUIET_MS,
        debounce=_BURST_MS,
    )
    upcoming = asyncio.ensure_future(anext(changes))
    try:
        await asyncio.sleep(0)  # the watch is set up before anext first waits
        await changed()
        while not any(Path(path) == directory for _, path in await upcoming):
            upcoming = asyncio.ensure_future(anext(changes))  # before `changed`, which may take its time
            await changed()
    finally:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)
        await changes.aclose()
