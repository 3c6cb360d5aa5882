"""Rollout: which revision of one pool's document is the current one, and which was the first to hold each policy."""

from collections.abc import Mapping
from typing import NamedTuple

from evenhand_operator.observed import ObservedPolicy
from evenhand_policy.config import SchedulerConfig
from evenhand_policy.push_document import Document
from evenhand_policy.version import MAX_LEAD, Version

_ALWAYS = Version(0, 0)


class Stored(NamedTuple):
    """What an earlier leader has left: the last revision that is known of, and its document, where that can be read."""

    revision: int
    num_replicas: int = 1
    config: SchedulerConfig | None = None
    document: Document | None = None


class Rollout:
    """One leader's memory of one pool. Epoch and revision only ever grow, and the revision with whatever changes.

    Attributes:
        config, document: the current ones; None before the first.
        num_replicas: among how many engines the pool's limits are divided.
        version: of these.
    """

    def __init__(self, epoch: int, stored: Stored) -> None:
        self._is_new = True
        self._first: dict[str, tuple[int, Version]] = {}
        self.config = stored.config
        self.document = stored.document
        self.num_replicas = stored.num_replicas
        self.version = Version(epoch, stored.revision)

    def first_version(self, policy: ObservedPolicy) -> Version | None:
        """The first version that held this generation of the policy; None: it is in none."""
        generation, version = self._first.get(policy.uid, (None, _ALWAYS))
        return version if generation == policy.generation else None

    def advance(
        self, config: SchedulerConfig, document: Document, num_replicas: int, policies: Mapping[str, ObservedPolicy]
    ) -> bool:
        """Make these the current ones; returns whether that changed anything.

        `policies` are the observed ones by uid: what an earlier leader reported of them holds, at the first call.
        """
        is_same = self.document is not None and (self.document.digest, self.num_replicas) == (
            document.digest,
            num_replicas,
        )
        self.config, self.document, self.num_replicas = config, document, num_replicas
        if is_same and not self._is_new:
            return False
        if not is_same:
            self.version = self.version._replace(revision=self.version.revision + 1)
        self._remember_first(policies if self._is_new else {})
        self._is_new = False
        return True

    def raise_above(self, epoch: int, seen: Version) -> None:
        """Start a new epoch, after a pod was seen to enforce a `seen` version that this leader did not make.

        Whatever is in that document, nothing is known to be in force before the new one is.
        """
        revision = max(self.version.revision, min(seen.revision, self.version.revision + MAX_LEAD)) + 1
        self.version = Version(epoch, revision)
        self._first = {uid: (generation, self.version) for uid, (generation, _) in self._first.items()}

    def _remember_first(self, policies: Mapping[str, ObservedPolicy]) -> None:
        known, self._first = self._first, {}
        assert self.config
        for tenant in self.config.tenants:
            before = known.get(tenant.uid)
            if before is not None and before[0] == tenant.generation:
                self._first[tenant.uid] = before
            elif (policy := policies.get(tenant.uid)) is not None and policy.is_programmed:
                self._first[tenant.uid] = (tenant.generation, _ALWAYS)
            else:
                self._first[tenant.uid] = (tenant.generation, self.version)
