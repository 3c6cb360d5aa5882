"""Version: the order of everything that a pool's engines were ever told. It only grows.

`epoch` is the term of a leader, by the compare-and-swap that takes the Lease, so that a leader that was replaced, a late
or a repeated request do no harm; `revision` counts within it. A version stands for one document and one number of
replicas, so nothing else has to be compared to know who is up to date, and no clock.
"""

from enum import Enum, auto
from typing import NamedTuple

MAX_EPOCH = 2**62
"""No epoch is higher, whoever says so: from there on nobody could be overtaken."""
MAX_LEAD = 2**20
"""So far ahead of the leader may a pod be that is overtaken; one that claims more is not believed."""


class Version(NamedTuple):
    """Epoch and revision."""

    epoch: int
    revision: int


class Assignment(NamedTuple):
    """What an engine is to enforce, or enforces.

    Attributes:
        version: of this assignment.
        digest: of the document.
        num_replicas: among how many engines the pool's limits are divided.
    """

    version: Version
    digest: str
    num_replicas: int


class Verdict(Enum):
    """What an engine does about an assignment."""

    IN_FORCE = auto()  # nothing: it is in force
    RELABEL = auto()  # enforce the document that is in force under this version and for so many replicas
    REPLACE = auto()  # enforce the document of that digest, which has to come with it
    OUTDATED = auto()  # refuse: what is in force is newer
    CONFLICT = auto()  # refuse: something else is in force in this version


def judge(in_force: Assignment, offered: Assignment) -> Verdict:
    """The engine's decision, in full."""
    if offered == in_force:
        return Verdict.IN_FORCE
    if offered.version < in_force.version:
        return Verdict.OUTDATED
    if offered.version == in_force.version:
        return Verdict.CONFLICT
    return Verdict.RELABEL if offered.digest == in_force.digest else Verdict.REPLACE


def may_be_overtaken(seen: Version, own: Version) -> bool:
    """Whether a leader at `own` believes a pod that says it enforces `seen`."""
    return seen.epoch <= min(own.epoch + MAX_LEAD, MAX_EPOCH)
