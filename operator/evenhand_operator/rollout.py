"""Rollout: which revision of one pool's document is the current one, and which was the first to hold each policy."""

from collections.abc import Mapping

from msgspec.structs import replace

from evenhand_operator.observed import ObservedPolicy
from evenhand_operator.pod_link import Version
from evenhand_policy.config import SchedulerConfig

_ALWAYS: Version = (0, 0)


class Rollout:
    """One leader's memory of one pool. Epoch and revision only ever grow.

    Attributes:
        document: the current one, with epoch and revision.
    """

    def __init__(self, epoch: int, revision: int, document: SchedulerConfig | None) -> None:
        """Continue after what was stored: `document` is that of `revision`, None where it is not known."""
        self._stored = document
        self.document = replace(SchedulerConfig(), epoch=epoch, revision=revision)
        self._is_new = True
        self._first: dict[str, tuple[int, Version]] = {}

    @property
    def version(self) -> Version:
        """Epoch and revision of the current document."""
        return self.document.epoch, self.document.revision

    def first_version(self, policy: ObservedPolicy) -> Version | None:
        """The first version that held this generation of the policy; None: it is in none."""
        generation, version = self._first.get(policy.uid, (None, _ALWAYS))
        return version if generation == policy.generation else None

    def advance(self, config: SchedulerConfig, policies: Mapping[str, ObservedPolicy]) -> bool:
        """Make `config`, which has no version, the current document; returns whether that changed anything.

        `policies` are the observed ones by uid: what an earlier leader reported of them holds, at the first call.
        """
        epoch, revision = self.version
        if self._is_new:
            is_same = self._stored is not None and _content(self._stored) == config
            revision += not is_same
        elif _content(self.document) == config:
            return False
        else:
            revision += 1
        self.document = replace(config, epoch=epoch, revision=revision)
        self._remember_first(policies if self._is_new else {})
        self._is_new, self._stored = False, None
        return True

    def raise_above(self, epoch: int, seen: Version) -> None:
        """Start a new epoch, after a pod was seen to enforce a `seen` version that this leader did not make.

        Whatever is in that document, nothing is known to be in force before the new one is.
        """
        revision = max(self.document.revision, seen[1]) + 1
        self.document = replace(self.document, epoch=epoch, revision=revision)
        self._first = {uid: (generation, self.version) for uid, (generation, _) in self._first.items()}

    def _remember_first(self, policies: Mapping[str, ObservedPolicy]) -> None:
        known, self._first = self._first, {}
        for tenant in self.document.tenants:
            before = known.get(tenant.uid)
            if before is not None and before[0] == tenant.generation:
                self._first[tenant.uid] = before
            elif (policy := policies.get(tenant.uid)) is not None and policy.is_programmed:
                self._first[tenant.uid] = (tenant.generation, _ALWAYS)
            else:
                self._first[tenant.uid] = (tenant.generation, self.version)


def _content(document: SchedulerConfig) -> SchedulerConfig:
    return replace(document, epoch=0, revision=0)
