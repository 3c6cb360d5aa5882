"""What is wrong with a policy, as a value: it ends in a condition, in a file's error or in a report of the CLI."""

from enum import StrEnum
from typing import Protocol

import msgspec

from evenhand_policy.schema import Metadata


class Reason(StrEnum):
    """Why an object is refused; on a TenantPolicy it is the reason of `Accepted=False`."""

    INVALID = "Invalid"  # the object itself is wrong, whatever else exists
    POOL_NOT_FOUND = "PoolNotFound"
    NOT_ALLOWED = "NotAllowed"  # the pool does not admit this namespace, or the policy claims what is not its own
    NAMESPACE_UNKNOWN = "NamespaceUnknown"  # the labels that decide whether it is admitted are not known
    EXCEEDS_GRANT = "ExceedsGrant"  # a guest claims more than the pool grants its namespace
    SECRET_NOT_FOUND = "SecretNotFound"
    WEAK_KEY = "WeakKey"  # an API key that could be guessed from its hash
    CONFLICTED = "Conflicted"  # an older policy has this tenant
    IDENTITY_CONFLICTED = "IdentityConflicted"  # an older policy has this key, ServiceAccount or header value
    OVERLAPPING = "Overlapping"  # of a pool: it selects pods that another pool has
    GUARANTEE_OVERCOMMITTED = "GuaranteeOvercommitted"  # the guarantees of older policies leave too little


class ResourceReference(msgspec.Struct, frozen=True, order=True):
    """One object by kind and name; its text is `TenantPolicy inference/chatbot`."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Named(Protocol):
    """Any resource."""

    @property
    def kind(self) -> str: ...

    @property
    def metadata(self) -> Metadata: ...


def reference(resource: Named) -> ResourceReference:
    """The resource by kind and name."""
    return ResourceReference(resource.kind, resource.metadata.namespace, resource.metadata.name)


class PolicyProblem(msgspec.Struct, frozen=True, kw_only=True):
    """One reason why one object is refused.

    Attributes:
        resource: the object at fault.
        path: the field at fault, such as `spec.limits.queueTimeout`; empty for the object as a whole.
        reason: machine-readable.
        message: what is wrong and what to do, without the path. Never holds a credential.
        claimant: the object that already has what this one claims; None where the reason is no conflict.
    """

    resource: ResourceReference
    path: str
    reason: Reason
    message: str
    claimant: ResourceReference | None = None

    def __str__(self) -> str:
        where = f"{self.resource}: {self.path}" if self.path else f"{self.resource}"
        return f"{where}: {self.message} ({self.reason})"


def problem_of(
    resource: Named, reason: Reason, path: str, message: str, claimant: ResourceReference | None = None
) -> PolicyProblem:
    """A problem of a whole resource or of one of its fields."""
    return PolicyProblem(resource=reference(resource), path=path, reason=reason, message=message, claimant=claimant)


class InvalidResourceError(ValueError):
    """An object does not fit its schema. `problem` has reason `Invalid`."""

    def __init__(self, problem: PolicyProblem) -> None:
        super().__init__(str(problem))
        self.problem = problem
