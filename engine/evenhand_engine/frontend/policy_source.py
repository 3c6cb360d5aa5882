"""PolicySource: a directory of policy files, watched; each version that compiles is enforced, a bad one is reported.

Owns nothing but the watch. The last good config stays in force whatever happens to the files.
"""

import asyncio
from pathlib import Path

from evenhand_engine.errors import StartupError
from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import ConfigDocument
from evenhand_engine.frontend.directory_watch import watch_directory
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.files import PolicyFileError, load_policy_directory
from evenhand_policy.push_protocol import ConfigSource


def load_initial(directory: Path) -> SchedulerConfig:
    """The config to start with; raises StartupError with every problem of the files."""
    try:
        return load_policy_directory(directory)
    except PolicyFileError as error:
        raise StartupError(f"the policies in {directory} cannot be used:\n{error}") from error


class PolicySource:
    """Watches a directory and puts in force what it compiles to."""

    def __init__(self, directory: Path, in_force: ConfigInForce) -> None:
        self._directory = directory
        self._in_force = in_force

    async def run(self) -> None:
        """Until cancelled."""
        await watch_directory(self._directory, self._load)

    async def _load(self) -> None:
        try:
            config = await asyncio.to_thread(load_policy_directory, self._directory)
        except PolicyFileError as error:
            self._in_force.reject(str(error))
        else:
            self._in_force.replace(ConfigDocument.unversioned(config, ConfigSource.FILES))
