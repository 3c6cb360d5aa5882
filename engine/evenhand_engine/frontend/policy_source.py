"""PolicySource: a directory of policy files, watched; each version that compiles is enforced, a bad one is reported.

Owns nothing but the watch. The last good config stays in force whatever happens to the files.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.directory_watch import watch_directory
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.files import PolicyFileError, load_policy_directory


def load_initial(directory: Path) -> SchedulerConfig:
    """The config to start with; raises StartupError with every problem of the files."""
    try:
        return load_policy_directory(directory)
    except PolicyFileError as error:
        raise StartupError(f"the policies in {directory} cannot be used:\n{error}") from error


class PolicySource:
    """Watches a directory and hands on what it compiles to.

    Args:
        directory: of policy files.
        apply: called with each config, also if it is the same again.
        reject: called with the reason when the files do not compile.
    """

    def __init__(
        self, directory: Path, apply: Callable[[SchedulerConfig], None], reject: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._apply = apply
        self._reject = reject

    async def run(self) -> None:
        """Until cancelled."""
        await watch_directory(self._directory, self._load)

    async def _load(self) -> None:
        try:
            config = await asyncio.to_thread(load_policy_directory, self._directory)
        except PolicyFileError as error:
            self._reject(str(error))
        else:
            self._apply(config)
