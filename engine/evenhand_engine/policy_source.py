"""PolicySource: a directory of policy files, watched; each version that compiles is enforced, a bad one is reported.

Owns nothing but the watch. The last good config stays in force whatever happens to the files.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import watchfiles

from evenhand_engine.errors import StartupError
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.files import PolicyFileError, load_policy_directory

log = logging.getLogger(__name__)

_QUIET_MS = 50  # a burst of changes has ended after so long without one ...
_BURST_MS = 400  # ... or is taken as it is
_RETRY_SECONDS = 5.0


def load_initial(directory: Path) -> SchedulerConfig:
    """The config to start with; raises StartupError with every problem of the files."""
    try:
        return load_policy_directory(directory)
    except PolicyFileError as error:
        raise StartupError(f"the policies in {directory} cannot be used:\n{error}") from error


class PolicySource:
    """Watches a directory and hands on what it compiles to.

    Args:
        directory: of policy files; a mounted ConfigMap works too, and it may be replaced as a whole.
        apply: called with each new config.
        reject: called with the reason when the files do not compile.
    """

    def __init__(
        self, directory: Path, apply: Callable[[SchedulerConfig], None], reject: Callable[[str], None]
    ) -> None:
        self._directory = directory.absolute()
        self._apply = apply
        self._reject = reject

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._watch()
            except (OSError, RuntimeError) as error:  # such as too many inotify watches
                log.warning("policies are not watched", extra={"fields": {"error": error, "retry": _RETRY_SECONDS}})
                await asyncio.sleep(_RETRY_SECONDS)

    async def _watch(self) -> None:
        """Load once the watch stands, so that nothing is missed, and then after each burst of changes.

        The parent is watched too: it tells that the directory itself was replaced; then this returns, to begin anew.
        """
        changes = watchfiles.awatch(
            *(path for path in (self._directory, self._directory.parent) if path.is_dir()),
            watch_filter=lambda _, path: self._concerns(Path(path)),
            recursive=False,
            step=_QUIET_MS,
            debounce=_BURST_MS,
        )
        upcoming = asyncio.ensure_future(anext(changes))
        try:
            await asyncio.sleep(0)  # the watch is set up before anext first waits
            await self._reload()
            while not any(Path(path) == self._directory for _, path in await upcoming):
                await self._reload()
                upcoming = asyncio.ensure_future(anext(changes))
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
            await changes.aclose()

    async def _reload(self) -> None:
        try:
            config = await asyncio.to_thread(load_policy_directory, self._directory)
        except PolicyFileError as error:
            self._reject(str(error))
        else:
            self._apply(config)

    def _concerns(self, path: Path) -> bool:
        return path == self._directory or path.parent == self._directory
