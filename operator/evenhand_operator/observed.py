"""TenantPolicies and EnginePools as the operator sees them: what is asked for, and what their status says.

An object may be of a newer schema than the operator's, since CRDs are upgraded first: what is not known of its spec is
ignored and told in a condition. A status may have been written by another version of the operator, so what is not known
there is ignored too.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

import msgspec

from evenhand_operator.objects import Json, ObjectKey, read_meta
from evenhand_policy.decode import decode_stored
from evenhand_policy.errors import InvalidResourceError, PolicyProblem, ResourceReference
from evenhand_policy.pool import EnginePool
from evenhand_policy.schema import Model
from evenhand_policy.spec import TenantPolicy
from evenhand_policy.status import (
    Condition,
    ConditionStatus,
    ConditionType,
    EnginePoolStatus,
    PodStatus,
    TenantPolicyStatus,
)

_Resource = TypeVar("_Resource", bound=Model)
_Status = TypeVar("_Status", bound=Model)

STRANGERS = "evenhand-operator/"
"""How the field managers of installations that leave a pool alone begin; the Lease of the installation follows."""

_OWN_TYPES = frozenset(map(str, ConditionType))


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What policies and pools have in common.

    Attributes:
        problem: why the object cannot be read; None where it can.
        ignored: paths of the fields that only a newer operator knows.
    """

    kind: ClassVar[str]

    key: ObjectKey
    uid: str
    generation: int
    problem: PolicyProblem | None
    ignored: tuple[str, ...] = ()

    @property
    def reference(self) -> ResourceReference:
        """Kind, namespace and name."""
        return ResourceReference(self.kind, *self.key)


class ObservedPolicy(Observed, frozen=True, kw_only=True):
    """A TenantPolicy. `policy` is None where there is a problem."""

    kind: ClassVar[str] = "TenantPolicy"

    policy: TenantPolicy | None
    status: TenantPolicyStatus

    @property
    def request(self) -> object:
        """What decides about documents; the status does not."""
        return self.generation, self.policy, self.problem

    @property
    def is_programmed(self) -> bool:
        """Whether it was reported that every ready pod enforces this very generation."""
        return self.status.observed_generation == self.generation and any(
            condition.type == ConditionType.PROGRAMMED and condition.status is ConditionStatus.TRUE
            for condition in self.status.conditions
        )


class ObservedPool(Observed, frozen=True, kw_only=True):
    """An EnginePool.

    Attributes:
        pool: None where there is a problem.
        strangers: field managers of installations that leave the pool alone and say so, and when they last did.
    """

    kind: ClassVar[str] = "EnginePool"

    pool: EnginePool | None
    status: EnginePoolStatus
    strangers: tuple[tuple[str, str], ...] = ()

    @property
    def request(self) -> object:
        """What decides about documents; the status does not."""
        return self.generation, self.pool, self.problem


def read_policy(obj: Json) -> ObservedPolicy | None:
    """A TenantPolicy as the API server sends it; None for one that is being deleted."""
    meta = read_meta(obj)
    if meta.deletion_timestamp is not None:
        return None
    policy, problem, ignored = _read_resource(obj, TenantPolicy)
    return ObservedPolicy(
        key=meta.key,
        uid=meta.uid,
        generation=meta.generation,
        policy=policy,
        problem=problem,
        ignored=ignored,
        status=_read_status(obj, TenantPolicyStatus),
    )


def read_pool(obj: Json) -> ObservedPool | None:
    """An EnginePool as the API server sends it; None for one that is being deleted."""
    meta = read_meta(obj)
    if meta.deletion_timestamp is not None:
        return None
    pool, problem, ignored = _read_resource(obj, EnginePool)
    return ObservedPool(
        key=meta.key,
        uid=meta.uid,
        generation=meta.generation,
        pool=pool,
        problem=problem,
        ignored=ignored,
        status=_read_status(obj, EnginePoolStatus),
        strangers=tuple(_strangers(obj["metadata"].get("managedFields") or ())),
    )


def _strangers(managed_fields: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for entry in managed_fields:
        manager = str(entry.get("manager", ""))
        if manager.startswith(STRANGERS) and entry.get("subresource") == "status":
            yield manager, str(entry.get("time", ""))


def _read_resource(
    obj: Json, resource_type: type[_Resource]
) -> tuple[_Resource | None, PolicyProblem | None, tuple[str, ...]]:
    spec = {key: value for key, value in obj.items() if key != "status"}
    try:
        resource, ignored = decode_stored(spec, resource_type)
    except InvalidResourceError as error:
        return None, error.problem, ()
    return resource, None, ignored


def _read_status(obj: Json, status_type: type[_Status]) -> _Status:
    """The known members; of what is malformed, nothing."""
    written = obj.get("status")
    if not isinstance(written, Mapping):
        return status_type()
    known = _known(written, status_type)
    for name, item_type in (("conditions", Condition), ("pods", PodStatus)):
        if isinstance(known.get(name), list):
            items = (item for item in known[name] if isinstance(item, Mapping))
            known[name] = [_known(item, item_type) for item in items if name != "conditions" or _is_own(item)]
    try:
        return msgspec.convert(known, status_type)
    except msgspec.ValidationError:
        return status_type()


def _is_own(condition: Mapping[str, Any]) -> bool:
    """Conditions of other types are others', and no reason to write ours again."""
    return condition.get("type") in _OWN_TYPES


def _known(value: Mapping[str, Any], struct_type: type[msgspec.Struct]) -> Json:
    names = _names(struct_type)
    return {name: item for name, item in value.items() if name in names and item is not None}


@cache
def _names(struct_type: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(struct_type))
