"""From a decoded YAML or JSON object to a resource, or to the one problem that is in the way.

Accepts what the API server accepts with strict field validation: null stands for a field that is not set, an integral
number for an integer, an unknown field is an error. Of an object that an API server has stored already, `decode_stored`
ignores fields that are unknown, and values where a field says so: it knew them, so they are no mistakes but of a newer schema.
"""

import contextlib
import difflib
import functools
import re
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from evenhand_policy.errors import InvalidResourceError, PolicyProblem, Reason, ResourceReference
from evenhand_policy.schema import NEWER_IGNORED, Model

_Resource = TypeVar("_Resource", bound=Model)

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(.*)`")
_SHOWN_CHARACTERS = 80


def decode(obj: object, resource_type: type[_Resource]) -> _Resource:
    """The object as a resource.

    Raises:
        InvalidResourceError: it does not fit; the problem names the path and, for a misspelt field, the field meant.
    """
    with contextlib.suppress(msgspec.ValidationError):
        return msgspec.convert(obj, resource_type)
    info = _type_info(resource_type)
    try:
        return msgspec.convert(_normalise(obj, info), resource_type)
    except msgspec.ValidationError as error:
        path, message = _explain(str(error), info)
        reference = reference_to(obj, resource_type.__name__)
        problem = PolicyProblem(resource=reference, path=path, reason=Reason.INVALID, message=message)
        raise InvalidResourceError(problem) from None


def decode_stored(obj: object, resource_type: type[_Resource]) -> tuple[_Resource, tuple[str, ...]]:
    """An object of the API server as a resource, and the paths of the fields that were ignored.

    Raises:
        InvalidResourceError: what is known of it does not fit.
    """
    try:
        return decode(obj, resource_type), ()
    except InvalidResourceError:
        ignored: list[str] = []
        known = _drop_unknown(obj, _type_info(resource_type), "", ignored)
        return decode(known, resource_type), tuple(ignored)


_type_info = functools.cache(inspect.type_info)


def reference_to(obj: object, kind: str) -> ResourceReference:
    """Kind, namespace and name of an object, as far as it has them."""
    metadata = obj.get("metadata") if isinstance(obj, dict) else None
    values = metadata if isinstance(metadata, dict) else {}
    return ResourceReference(kind, _shown(values.get("namespace", "default")), _shown(values.get("name", "?")))


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else "?"
    return text[:_SHOWN_CHARACTERS].encode("ascii", "backslashreplace").decode()


def _bare(info: inspect.Type | None) -> inspect.Type | None:
    """The type without annotations and without `| None`."""
    while isinstance(info, inspect.Metadata | inspect.UnionType):
        if isinstance(info, inspect.Metadata):
            info = info.type
        else:
            info = next(member for member in info.types if not isinstance(member, inspect.NoneType))
    return info


def _member(info: inspect.Type | None, key: str) -> inspect.Type | None:
    """Type of a struct's field, of a list's item or of a map's value; None where there is no such thing."""
    match _bare(info):
        case inspect.StructType(fields=fields):
            return next((field.type for field in fields if field.encode_name == key), None)
        case inspect.VarTupleType(item_type=item_type):
            return item_type
        case inspect.DictType(value_type=value_type):
            return value_type
    return None


def _normalise(value: Any, info: inspect.Type | None) -> Any:
    """Drop nulls of known fields and turn integral floats into integers where an integer is expected."""
    bare = _bare(info)
    if isinstance(value, float) and isinstance(bare, inspect.IntType) and value.is_integer():
        return int(value)
    if isinstance(value, list) and isinstance(bare, inspect.VarTupleType):
        return [_normalise(item, bare.item_type) for item in value]
    if isinstance(value, dict) and isinstance(bare, inspect.StructType | inspect.DictType):
        members = {key: _member(bare, key) for key in value}
        return {
            key: _normalise(item, members[key])
            for key, item in value.items()
            if item is not None or members[key] is None
        }
    return value


def _drop_unknown(value: Any, info: inspect.Type | None, path: str, dropped: list[str]) -> Any:
    """The value without fields that a strict struct does not have, and without values that only a newer version knows,
    where those may be missing; their paths are added to `dropped`."""
    bare = _bare(info)
    if isinstance(value, list) and isinstance(bare, inspect.VarTupleType):
        is_optional = _is_newer_ignored(info)
        kept_items = []
        for index, item in enumerate(value):
            inner = f"{path}[{index}]"
            if is_optional and _has_newer_value(item, bare.item_type):
                dropped.append(inner)
            else:
                kept_items.append(_drop_unknown(item, bare.item_type, inner, dropped))
        return kept_items
    if not isinstance(value, dict) or not isinstance(bare, inspect.StructType):
        return value
    kept = {}
    for key, item in value.items():
        inner = f"{path}.{_shown(key)}".lstrip(".")
        member = _member(bare, key)
        if member is not None and _is_newer_ignored(member) and _has_newer_value(item, member):
            dropped.append(inner)
        elif member is not None:
            kept[key] = _drop_unknown(item, member, inner, dropped)
        elif bare.cls.__struct_config__.forbid_unknown_fields:
            dropped.append(inner)
    return kept


def _is_newer_ignored(info: inspect.Type | None) -> bool:
    return isinstance(info, inspect.Metadata) and NEWER_IGNORED.items() <= (info.extra or {}).items()


def _has_newer_value(value: Any, info: inspect.Type | None) -> bool:
    """Whether it is a value of an enum that this version lacks, or an object of a kind that it lacks."""
    bare = _bare(info)
    if isinstance(bare, inspect.EnumType):
        return isinstance(value, str) and value not in {each.value for each in bare.cls}
    if isinstance(bare, inspect.StructType) and isinstance(value, dict):
        kinds = (field for field in bare.fields if field.required and isinstance(_bare(field.type), inspect.EnumType))
        return any(_has_newer_value(value.get(field.encode_name), field.type) for field in kinds)
    return False


def _explain(text: str, info: inspect.Type) -> tuple[str, str]:
    """Path and message of a validation error of msgspec, in words that say what to do."""
    message, found, location = text.rpartition(" - at `")
    if not found:
        message, location = text, "$`"
    path = location.rpartition("$")[2].rstrip("`")
    for name, _ in _STEP.findall(path):
        info = _member(info, name) or info
    shown_path = path.removeprefix(".").replace("[...]", "")
    if unknown := _UNKNOWN_FIELD.fullmatch(message):
        return f"{shown_path}.{_shown(unknown[1])}".lstrip("."), _advise_on_unknown(unknown[1], info)
    if missing := _MISSING_FIELD.fullmatch(message):
        return shown_path, f"the field `{missing[1]}` is missing"
    if (expected := _expectation(info)) and message.startswith(("Expected", "Invalid enum value")):
        return shown_path, f"expected {expected}"
    return shown_path, message[:1].lower() + message[1:]


def _advise_on_unknown(name: str, info: inspect.Type) -> str:
    bare = _bare(info)
    known = [field.encode_name for field in bare.fields] if isinstance(bare, inspect.StructType) else []
    close = difflib.get_close_matches(name[:_SHOWN_CHARACTERS], known, n=1)
    advice = f"did you mean `{close[0]}`?" if close else f"known fields are {', '.join(known)}"
    return f"unknown field; {advice}"


def _expectation(info: inspect.Type | None) -> str | None:
    """What the annotation says that a value should look like."""
    match info:
        case inspect.Metadata(extra={"expected": text}):
            return str(text)
        case inspect.Metadata(type=inner):
            return _expectation(inner)
        case inspect.UnionType(types=members):
            return next((found for member in members if (found := _expectation(member))), None)
        case inspect.IntType(ge=int(least), le=int(most)):
            return f"an integer from {least} to {most}"
        case inspect.EnumType(cls=enum):
            return "one of " + ", ".join(str(member.value) for member in enum)
        case inspect.LiteralType(values=values):
            return " or ".join(str(value) for value in values)
    return None
