"""What the operator reports: the `status` of TenantPolicy and EnginePool, exactly as in their CRDs."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from evenhand_policy.schema import Model


class ConditionType(StrEnum):
    """Types of conditions; each is True, False or Unknown."""

    ACCEPTED = "Accepted"  # the object is valid, allowed, and has what it claims
    PROGRAMMED = "Programmed"  # every ready engine pod enforces this generation
    READY = "Ready"  # both of the above: what `kubectl wait` and Flux look at
    STALLED = "Stalled"  # True: nothing will change until somebody acts


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Revision = Annotated[int, Meta(ge=0)]
Time = Annotated[str, Meta(max_length=64, extra_json_schema={"format": "date-time"})]


class Condition(Model, frozen=True, kw_only=True):
    """One aspect of an object's state (meta/v1 Condition)."""

    type: Annotated[
        str,
        Meta(
            max_length=316,
            pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?\Z",
            description="Accepted, Programmed, Ready or Stalled.",
        ),
    ]
    status: Annotated[ConditionStatus, Meta(description="True, False or Unknown.")]
    observed_generation: Annotated[
        Revision | None, Meta(description="Generation of the object that the condition is about.")
    ] = None
    last_transition_time: Annotated[Time, Meta(description="When the status last changed.")]
    reason: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=1024,
            pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?\Z",
            description="Why, for programs, in one word.",
        ),
    ]
    message: Annotated[str, Meta(max_length=32768, description="Why, and what to do, for people.")]


Conditions = Annotated[
    tuple[Condition, ...],
    Meta(
        max_length=8,
        description="Accepted, Programmed, Ready and Stalled.",
        extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]
ObservedGeneration = Annotated[
    Revision | None, Meta(description="Generation of the spec that this status is about; another one is pending.")
]

PENDING: tuple[Condition, ...] = tuple(
    Condition(
        type=kind,
        status=ConditionStatus.UNKNOWN,
        last_transition_time="1970-01-01T00:00:00Z",
        reason="Pending",
        message="Waiting for the operator",
    )
    for kind in (ConditionType.ACCEPTED, ConditionType.PROGRAMMED, ConditionType.READY)
)
"""Conditions of an object that no operator has seen yet; without them tools would take it for ready."""


class TenantPolicyStatus(Model, frozen=True, kw_only=True):
    """What became of the policy. Written by the operator."""

    conditions: Conditions = PENDING
    observed_generation: ObservedGeneration = None
    programmed_revision: Annotated[
        Revision | None, Meta(description="First revision of the pool's document that holds this generation.")
    ] = None


class PodState(StrEnum):
    """Where a pod stands."""

    APPLIED = "Applied"  # enforces the current revision
    PENDING = "Pending"  # has not answered yet
    REJECTED = "Rejected"  # refused the document and keeps what it has
    UNREACHABLE = "Unreachable"


class PodStatus(Model, frozen=True, kw_only=True):
    """One engine pod, by its own last answer."""

    name: Annotated[str, Meta(max_length=253, description="Name of the pod.")]
    boot_id: Annotated[
        Annotated[str, Meta(max_length=128)] | None,
        Meta(description="Identity of the engine process; another one after every restart."),
    ] = None
    epoch: Annotated[Revision | None, Meta(description="Epoch of the document that the pod enforces.")] = None
    revision: Annotated[Revision | None, Meta(description="Revision of the document that the pod enforces.")] = None
    state: Annotated[PodState, Meta(description="Applied, Pending, Rejected or Unreachable.")]
    message: Annotated[
        Annotated[str, Meta(max_length=1024)] | None, Meta(description="Why the pod is not in state Applied.")
    ] = None
    since: Annotated[Time | None, Meta(description="When the state last changed.")] = None
    backend: Annotated[
        Annotated[str, Meta(max_length=64)] | None,
        Meta(description="What generates there: evenhand, or the engine that a sidecar stands before, such as vllm."),
    ] = None


class EnginePoolStatus(Model, frozen=True, kw_only=True):
    """What the pool's engines enforce. Written by the operator."""

    conditions: Conditions = PENDING
    observed_generation: ObservedGeneration = None
    operator: Annotated[
        Annotated[str, Meta(max_length=320)] | None,
        Meta(
            description="Namespace and name of the Lease of the operator that serves the pool; others leave it alone."
        ),
    ] = None
    epoch: Annotated[Revision | None, Meta(description="Term of the operator that wrote the current document.")] = None
    revision: Annotated[Revision | None, Meta(description="Number of the current document in its epoch.")] = None
    tenants: Annotated[Count | None, Meta(description="Tenants in the current document.")] = None
    desired_pods: Annotated[Count | None, Meta(description="Ready engine pods.")] = None
    applied_pods: Annotated[Count | None, Meta(description="Of these, pods that enforce the current document.")] = None
    applied: Annotated[
        Annotated[str, Meta(max_length=32)] | None, Meta(description="appliedPods/desiredPods, such as 3/3.")
    ] = None
    pods: Annotated[
        tuple[PodStatus, ...],
        Meta(
            max_length=1024,
            description="The engine pods, one by one.",
            extra_json_schema={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = ()
