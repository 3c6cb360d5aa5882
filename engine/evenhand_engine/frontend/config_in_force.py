"""ConfigInForce: the one owner of which config is in force, where it came from, and what is kept of it for the next start.

Policy files, a push and what is stored all end here. It decides nothing: who offers a document has checked it, and says
here what has become of it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

from evenhand_engine.frontend.config_store import ConfigDocument, LastGoodFile
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.push_protocol import ConfigSource
from evenhand_policy.version import Assignment

log = logging.getLogger(__name__)

Enforce = Callable[[ConfigDocument], None]
"""Enforce a config from now on. Raises DocumentRejectedError, and then changes nothing."""

_MAX_ERROR_CHARACTERS = 1000
_LOOK_SECONDS = 0.05


class ConfigInForce:
    """What is enforced, and how it came about.

    Attributes:
        document: in force, with what was said beside it.
        applied_at: since when this config is enforced among so many replicas.
        error, rejected_at: of the last config offered, if it was rejected; None if it is in force.
        results: how many configs were `applied` and `rejected`.
    """

    def __init__(self, document: ConfigDocument, last_good: LastGoodFile | None = None) -> None:
        """`last_good`: where to keep for the next start what the engine is well with; None: nowhere."""
        self.document = document
        self.applied_at = datetime.now(UTC)
        self.error: str | None = None
        self.rejected_at: datetime | None = None
        self.results: Counter[str] = Counter(applied=0, rejected=0)
        self._digest: str | None = None
        self._last_good = last_good
        self._enforce: Enforce = lambda _: None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def config(self) -> SchedulerConfig:
        return self.document.config

    @property
    def digest(self) -> str:
        """Of the config as this engine understands it; `assignment.digest` is that of the document as it came."""
        if self._digest is None:  # thousands of tenants take milliseconds, in which nothing would be in force yet
            self._digest = self.config.digest()
        return self._digest

    @property
    def source(self) -> ConfigSource:
        return self.document.source

    @property
    def assignment(self) -> Assignment:
        return self.document.assignment

    @property
    def num_replicas(self) -> int:
        """Engines that share the config's limits, this one included."""
        return self.assignment.num_replicas

    def on_change(self, enforce: Enforce) -> None:
        """From now on, `enforce` makes the front end and the engine do what a changed config says."""
        self._enforce = enforce

    def last_good(self) -> ConfigDocument | None:
        """What was kept in an earlier life; None where there is nothing usable."""
        return self._last_good.load() if self._last_good else None

    def replace(self, offered: ConfigDocument) -> None:
        """Put `offered` in force. Raises DocumentRejectedError where it cannot be enforced; what is in force then stays."""
        is_other = offered.config != self.config
        changes = is_other or offered.assignment.num_replicas != self.num_replicas
        if changes:
            self._enforce(offered)
            self.applied_at = datetime.now(UTC)
            self.results["applied"] += 1
        self.document = offered
        if is_other:
            self._digest = None
        self.confirm()
        if changes:
            fields = {
                "source": self.source,
                "replicas": self.num_replicas,
                "digest": self.assignment.digest,
                "tenants": len(self.config.tenants),
            }
            log.info("config applied", extra={"fields": fields})

    def confirm(self) -> None:
        """Note that the config offered last is the one in force."""
        self.error = self.rejected_at = None

    def reject(self, error: str) -> None:
        """Note that the config offered last cannot be used; what is in force stays."""
        self.error, self.rejected_at = error[:_MAX_ERROR_CHARACTERS], datetime.now(UTC)
        self.results["rejected"] += 1
        log.error("config rejected, the last good one stays in force", extra={"fields": {"error": self.error}})

    async def keep(self, ailment: Callable[[], str | None]) -> None:
        """Save the document for the next start when the engine is well with it: one that it dies of would kill it again."""
        if self._keeping is not None:
            self._keeping.cancel()
        if self._last_good is None:
            return
        if ailment() is None:
            await self._save(self._last_good, self.document)
        else:
            self._keeping = asyncio.create_task(self._save_when_well(self._last_good, self.document, ailment))

    async def _save_when_well(
        self, file: LastGoodFile, document: ConfigDocument, ailment: Callable[[], str | None]
    ) -> None:
        while ailment() is not None:
            await asyncio.sleep(_LOOK_SECONDS)
        await self._save(file, document)

    async def _save(self, file: LastGoodFile, document: ConfigDocument) -> None:
        """A pod that cannot save still enforces: only its next start is poorer."""
        try:
            await asyncio.to_thread(file.save, document)
        except OSError as error:
            log.error("the last good config cannot be saved", extra={"fields": {"error": str(error)}})
