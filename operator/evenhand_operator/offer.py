"""Offer: what the pods of a pool are to enforce. One is made for each pool and build, and read by whoever needs it."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from evenhand_policy.config import PoolReference
from evenhand_policy.push_document import Document
from evenhand_policy.version import Assignment, Version


class HoldReason(StrEnum):
    """Why the newest document of a pool is not rolled out; the reason of `Programmed=False`."""

    PAUSED = "Paused"
    DOCUMENT_TOO_LARGE = "DocumentTooLarge"


class Hold(NamedTuple):
    """What keeps the newest document of a pool back."""

    reason: HoldReason
    message: str


@dataclass(frozen=True, slots=True)
class Offer:
    """What a leader says to each pod of a pool.

    Attributes:
        cluster: uid of the namespace kube-system.
        pool: which one.
        document: what is to be enforced.
        version: of this offer; within a term it stands for everything else in it.
        num_replicas: among how many engines the pool's limits are divided.
        offered_at: monotonic time at which it was made; it decides nothing.
    """

    cluster: str
    pool: PoolReference
    document: Document = field(repr=False)
    version: Version
    num_replicas: int
    offered_at: float = field(default=0.0, compare=False)

    @property
    def assignment(self) -> Assignment:
        """As pods report it."""
        return Assignment(self.version, self.document.digest, self.num_replicas)
