"""Lint: what the operator would say of the objects in a set of files, without a cluster. Pure.

The files are those that a pipeline would apply: several pools, namespaces, objects of other kinds, which are passed over.
What is not among them cannot be checked and is a note: a pool, a Secret with keys (which is not kept in a repository), the
labels of a namespace. Files have no age, so of two that claim the same thing one is told, with the place of the other.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from evenhand_policy.compile import compile_policies
from evenhand_policy.config import LatencyClass
from evenhand_policy.errors import Named, Reason, ResourceReference, reference
from evenhand_policy.grants import Grant
from evenhand_policy.identities import ObjectKey
from evenhand_policy.identity_spec import IdentityType
from evenhand_policy.labels import LabelSelector
from evenhand_policy.pool import AllowedNamespaces, EnginePool, EnginePoolSpec, NamespacesFrom
from evenhand_policy.resource_files import Finding, ResourceFiles
from evenhand_policy.schema import Metadata
from evenhand_policy.secret import Secret, SecretKeys
from evenhand_policy.spec import TenantPolicy
from evenhand_policy.yaml_reader import Entry, YamlError

_GROUP = "evenhand.dev/"
_WIDEST_GRANT = Grant(
    namespaces=LabelSelector(),
    max_weight=1000,
    max_total_weight=1_000_000,
    max_guaranteed_percent=100,
    latency_classes=tuple(LatencyClass),
    min_inter_token_latency="1ms",
    identity_types=tuple(IdentityType),
)


class Level(StrEnum):
    """How bad it is: an error would be refused, a note could not be checked."""

    ERROR = "error"
    NOTE = "note"


class Remark(NamedTuple):
    """A finding, and how bad it is."""

    level: Level
    finding: Finding


class LintReport(NamedTuple):
    """Everything that was found, sorted by place, and how many policies and pools were looked at."""

    remarks: tuple[Remark, ...]
    num_policies: int
    num_pools: int

    def count(self, level: Level) -> int:
        """How many remarks are of that level."""
        return sum(remark.level is level for remark in self.remarks)


def lint(files: Iterable[tuple[str, bytes]]) -> LintReport:
    """Judge the objects in files, each given by name and content, together."""
    resources = _Files()
    for name, content in files:
        resources.add(name, content)
    notes = _Notes(resources)
    secrets = resources.secrets | dict(notes.absent_secrets())
    pools = {_key(pool): pool for pool in resources.pools}
    groups: dict[ObjectKey, list[TenantPolicy]] = {key: [] for key in pools}
    for policy in resources.policies:
        groups.setdefault(policy.pool_key, []).append(policy)
    for key, policies in groups.items():
        pool = pools.get(key)
        if pool is None:
            notes.absent_pool(key, policies)
        judged_by = pool or _stand_in(key)
        _, problems = compile_policies(policies, judged_by, secrets, namespace_labels=resources.namespaces)
        for problem in problems:
            if problem.reason is Reason.NAMESPACE_UNKNOWN:
                notes.add(problem.resource, problem.path, f"not checked: {problem.message}; or add it to the files")
            elif pool is not None or problem.reason is not Reason.EXCEEDS_GRANT:
                resources.report(problem)
    remarks = [*(Remark(Level.ERROR, each) for each in resources.findings), *notes.remarks]
    remarks.sort(key=lambda remark: (remark.finding.file, remark.finding.line or 0, remark.finding.text))
    return LintReport(tuple(remarks), len(resources.policies), len(resources.pools))


class _Files(ResourceFiles):
    """Files in which there may be anything that is applied to a cluster."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: dict[str, Mapping[str, str]] = {}

    def reject(self, file: str, content: bytes, error: YamlError) -> None:
        """Templates and the like are others' matter, unless they are of ours."""
        if _GROUP.encode() in content:
            super().reject(file, content, error)

    def add_entry(self, file: str, index: int, entry: Entry) -> None:
        """As the base does, and the items of a list; encrypted Secrets, and kinds of others with our names, are passed over."""
        value = entry.value
        if not isinstance(value, dict):
            return
        kind, version = value.get("kind"), value.get("apiVersion")
        if kind == "List" and isinstance(value.get("items"), list):
            for number in range(len(value["items"])):
                self.add_entry(file, index, _item(entry, number))
        elif kind in ("TenantPolicy", "EnginePool"):
            if version is None or str(version).startswith(_GROUP):
                super().add_entry(file, index, entry)
        elif kind != "Secret" or "sops" not in value:
            super().add_entry(file, index, entry)

    def add_foreign(self, file: str, index: int, entry: Entry, kind: Any) -> None:
        """The labels of a namespace decide whether a pool admits it; of all else nothing is wanted."""
        metadata = entry.value.get("metadata")
        if kind == "Namespace" and isinstance(metadata, dict):
            labels = metadata.get("labels")
            pairs = labels.items() if isinstance(labels, dict) else ()
            self.namespaces[str(metadata.get("name"))] = {str(key): str(value) for key, value in pairs}


class _Notes:
    """What could not be checked."""

    def __init__(self, resources: ResourceFiles) -> None:
        self.remarks: list[Remark] = []
        self._resources = resources

    def add(self, resource: ResourceReference, path: str, message: str) -> None:
        """One thing about a field of a resource."""
        found = self._resources.found_at(resource, path, message)
        self.remarks.append(Remark(Level.NOTE, found))

    def absent_pool(self, key: ObjectKey, policies: Iterable[TenantPolicy]) -> None:
        """Tell of each policy whose pool is elsewhere."""
        others = ", ".join(str(reference(pool)) for pool in self._resources.pools) or "none"
        for policy in policies:
            message = (
                f"not checked: EnginePool {key[0]}/{key[1]} is not among the files (pools there: {others}), so what it "
                "admits and grants is not known; correct the reference, or lint the pool's file too"
            )
            self.add(reference(policy), "spec.poolRef", message)

    def absent_secrets(self) -> Iterator[tuple[ObjectKey, Secret]]:
        """Stand-ins for the Secrets that are elsewhere, so that all else of who names them is checked."""
        for owner, path, keys in _named_secrets([*self._resources.policies, *self._resources.pools]):
            key = owner.metadata.namespace, keys.secret_ref.name
            if key not in self._resources.secrets:
                message = f"not checked: Secret {key[1]} is not among the files, so its keys are not known"
                self.add(reference(owner), path, message)
                metadata = Metadata(namespace=key[0], name=key[1])
                yield (
                    key,
                    Secret(metadata=metadata, string_data={"unknown": f"the-keys-of/{key[0]}/{key[1]}/elsewhere"}),
                )


def _named_secrets(owners: Iterable[TenantPolicy | EnginePool]) -> Iterator[tuple[Named, str, SecretKeys]]:
    """Each reference to a Secret with keys: whose, where, and what it says."""
    for owner in owners:
        if isinstance(owner, EnginePool):
            if owner.spec.gateway is not None:
                yield owner, "spec.gateway.apiKeys.secretRef.name", owner.spec.gateway.api_keys
            continue
        for index, identity in enumerate(owner.spec.identities):
            if identity.api_key is not None:
                yield owner, f"spec.identities[{index}].apiKey.secretRef.name", identity.api_key


def _stand_in(key: ObjectKey) -> EnginePool:
    """A pool that admits everybody, for policies whose own is not known."""
    spec = EnginePoolSpec(
        selector=LabelSelector(match_labels={"unknown": "pool"}),
        allowed_namespaces=AllowedNamespaces(from_=NamespacesFrom.ALL),
        grants=(_WIDEST_GRANT,),
    )
    metadata = Metadata(namespace=key[0], name=key[1])
    return EnginePool(api_version="evenhand.dev/v1alpha1", kind="EnginePool", metadata=metadata, spec=spec)


def _item(entry: Entry, number: int) -> Entry:
    """An item of a list as an entry of its own."""
    prefix = f"items[{number}]"
    lines = {
        re.sub(r"^\.", "", path[len(prefix) :]): line
        for path, line in entry.lines.items()
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}["))
    }
    return Entry(entry.value["items"][number], lines)


def _key(pool: EnginePool) -> ObjectKey:
    return pool.metadata.namespace, pool.metadata.name
