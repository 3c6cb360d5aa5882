"""The one JSON form of a config that is sent: without members at their default, and without what a reader does not know.

So a newer operator's document is understood by an older engine for as long as nothing new is used, and where it is, the
operator can leave that out and say so. What a program understands follows from its own types: a path such as
`tenants.limits.requestsPerMinute` for each member, and `tenants.latencyClass=Batch` for each value of an enum.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

Json = dict[str, Any]
Members = frozenset[str]
"""Paths that a program understands."""


class Loss(NamedTuple):
    """A member that is set and was left out. `place` is that in the outermost list on the way; None: in none."""

    path: str
    place: int | None


class Compacted(NamedTuple):
    """What is sent, the members that are set in it, and what is not sent."""

    value: Json
    members: Members
    losses: tuple[Loss, ...]


def compact(value: msgspec.Struct, understood: Members | None = None) -> Compacted:
    """The struct as what msgspec encodes; `understood`: only what a reader with these members knows. None: everything."""
    members: set[str] = set()
    losses: list[Loss] = []
    kept = _compact_object(value, _shape(type(value), understood), members, losses, None)
    return Compacted(kept, frozenset(members), tuple(losses))


@functools.cache
def members_of(struct: type[msgspec.Struct]) -> Members:
    """Everything that a program which has this type understands."""
    return frozenset(_paths(inspect.type_info(struct), ""))


class _Field(NamedTuple):
    attribute: str
    name: str
    path: str
    default: Any
    inner: "tuple[_Field, ...] | None"
    is_known: bool
    known_values: Mapping[Any, str] | None  # of an enum, with the path of each


def _compact_object(
    obj: Any, shape: tuple[_Field, ...], members: set[str], losses: list[Loss], index: int | None
) -> Json:
    kept: Json = {}
    for attribute, name, path, default, inner, is_known, known_values in shape:
        item = getattr(obj, attribute)
        if item == default:
            continue
        if not is_known or (known_values is not None and item not in known_values):
            losses.append(Loss(path, index))
            continue
        if inner is None:
            kept[name] = item
            if known_values is not None:
                members.add(known_values[item])
        elif isinstance(item, tuple):
            places = enumerate(item) if index is None else ((index, each) for each in item)
            kept[name] = [_compact_object(each, inner, members, losses, place) for place, each in places]
        elif within := _compact_object(item, inner, members, losses, index):
            kept[name] = within
        else:
            continue
        members.add(path)
    return kept


@functools.lru_cache(maxsize=64)
def _shape(struct: type[msgspec.Struct], understood: Members | None) -> tuple[_Field, ...]:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return tuple(_fields(info, understood, ""))


def _fields(info: inspect.StructType, understood: Members | None, above: str) -> Iterator[_Field]:
    for field in info.fields:
        path = f"{above}.{field.encode_name}".lstrip(".")
        bare = _bare(field.type)
        inner, values = None, None
        if isinstance(bare, inspect.StructType):
            inner = tuple(_fields(bare, understood, path))
        elif isinstance(bare, inspect.EnumType):
            paths = {each: f"{path}={each.value}" for each in bare.cls}
            values = {each: of for each, of in paths.items() if understood is None or of in understood}
        is_known = understood is None or path in understood
        yield _Field(field.name, field.encode_name, path, field.default, inner, is_known, values)


def _paths(info: inspect.Type, path: str) -> Iterator[str]:
    bare = _bare(info)
    if path:
        yield path
    if isinstance(bare, inspect.EnumType):
        yield from (f"{path}={each.value}" for each in bare.cls)
    if isinstance(bare, inspect.StructType):
        for field in bare.fields:
            yield from _paths(field.type, f"{path}.{field.encode_name}".lstrip("."))


def _bare(info: inspect.Type) -> inspect.Type:
    """The type without annotations, without `| None`, and of a list that of its items."""
    while True:
        match info:
            case inspect.Metadata(type=inner) | inspect.VarTupleType(item_type=inner):
                info = inner
            case inspect.UnionType(types=types):
                info = next(each for each in types if not isinstance(each, inspect.NoneType))
            case _:
                return info
