"""How resources are described: strict structs whose annotations and rules are also the source of the CRDs.

A struct carries everything that the API server checks: types, bounds, defaults and descriptions as annotations, rules
between fields as `Rule`. `evenhand_policy.decode` applies it to an object.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

Uid = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z",
        max_length=36,
        extra={"expected": "a uid, such as 0f7cdb7e-4b5a-4f4e-8f52-3f7d2f1d9c11"},
    ),
]
DnsLabel = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z",
        max_length=63,
        extra={"expected": "a name of at most 63 lower-case letters, digits and inner dashes"},
    ),
]
DnsName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z",
        max_length=253,
        extra={"expected": "a name of at most 253 lower-case letters, digits, inner dashes and dots"},
    ),
]
Duration = Annotated[
    str,
    Meta(
        pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}\Z",
        max_length=28,
        extra={"expected": "a duration such as 500ms, 60s or 1m30s"},
    ),
]
"""A duration of the Gateway API (GEP-2257)."""
Timestamp = Annotated[
    str,
    Meta(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z",
        extra={"expected": "a time such as 2026-01-31T08:00:00Z"},
    ),
]
"""A time as the API server writes it, so that texts compare as times do."""

_DURATION_PART = re.compile(r"([0-9]+)(h|ms|m|s)")
_UNIT_MS = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule between the fields of one struct, in the two languages that enforce it.

    Attributes:
        message: what to do, in one sentence.
        cel: for the API server; empty where the structural schema says it already.
        holds: for this package; None for a rule about a change, which one object alone cannot break.
    """

    message: str
    cel: str
    holds: Callable[[Any], bool] | None


NEWER_IGNORED = {"newer": "ignored"}
"""In the `extra` of a field: of a stored object, a value that only a newer version knows is left out, as an unknown field is.
For fields whose default, or whose item's absence, lets nobody in and lifts no limit."""


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Base of resources and their parts. Raises ValueError with the message of the first rule that is broken."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    def __post_init__(self) -> None:
        for rule in self.rules:
            if rule.holds is not None and not rule.holds(self):
                raise ValueError(rule.message)


class Metadata(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a compiler needs of an object's metadata; other keys are allowed and ignored."""

    name: DnsName
    namespace: DnsLabel = "default"
    uid: Annotated[str, Meta(pattern=r"^[!-~]*\Z", max_length=128)] = ""
    generation: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    creation_timestamp: Timestamp = ""


def milliseconds(duration: str) -> int:
    """Length of a `Duration` in milliseconds."""
    return sum(int(count) * _UNIT_MS[unit] for count, unit in _DURATION_PART.findall(duration))


def within(field: str, attribute: str, least: str, most: str) -> Rule:
    """The duration in `field`, where it is set, lies between `least` and `most`, both included."""

    def holds(model: Any) -> bool:
        value = getattr(model, attribute)
        return value is None or milliseconds(least) <= milliseconds(value) <= milliseconds(most)

    value = f"duration(self.{field})"
    cel = f"!has(self.{field}) || {value} >= duration('{least}') && {value} <= duration('{most}')"
    return Rule(f"{field} must be between {least} and {most}", cel, holds)
