"""ConfigState: which SchedulerConfig is in force, where it came from, and what became of the last one offered."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from evenhand_policy.config import SchedulerConfig
from evenhand_policy.push_protocol import ConfigSource


@dataclass(slots=True)
class ConfigState:
    """What is enforced, and how it came about.

    Attributes:
        config, source, digest, applied_at: of the config in force.
        num_replicas: engines that share the config's limits, this one included.
        error, rejected_at: of the last config offered, if it was rejected; None if it is in force.
        results: how many configs were `applied` and `rejected`.
    """

    config: SchedulerConfig
    source: ConfigSource
    num_replicas: int = 1
    digest: str = ""
    applied_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    error: str | None = None
    rejected_at: datetime | None = None
    results: Counter[str] = field(default_factory=lambda: Counter(applied=0, rejected=0))

    def __post_init__(self) -> None:
        self.digest = self.config.digest()

    def apply(self, config: SchedulerConfig, source: ConfigSource, num_replicas: int) -> bool:
        """Note that `config` is the one offered last; returns whether it differs from the one in force."""
        self.error = self.rejected_at = None
        self.source = source  # the operator may push the very document that the engine started with
        digest = config.digest()
        if (digest, num_replicas) == (self.digest, self.num_replicas):
            return False
        self.config, self.num_replicas, self.digest = config, num_replicas, digest
        self.applied_at = datetime.now(UTC)
        self.results["applied"] += 1
        return True

    def reject(self, error: str) -> None:
        """Note that the config offered last was rejected; what is in force stays."""
        self.error = error
        self.rejected_at = datetime.now(UTC)
        self.results["rejected"] += 1
