"""Bodies: from bytes to typed fields, without ever making an object for each thing that a client may have put in.

A body is decoded once: known fields become typed, large ones stay raw JSON, and what is unknown is skipped. Raw members
are decoded when they are needed, a bounded part at a time, so that no step of it holds the interpreter for long. All of it
is run by `Service.compute`, off the event loop beyond a few KiB.
"""

import contextlib
import functools
import typing
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from evenhand_engine.errors import Refusal
from evenhand_engine.openai.members import TokenId
from evenhand_engine.openai.schema import DECLINED_BY, UNSUPPORTED, SamplingFields
from evenhand_engine.scheduler.request import bounded_priority

_TRUNCATED = "Input data was truncated"  # in msgspec's words
_PAIR = 6  # characters of the other half
_MAX_NEUTRAL_BYTES = 1024  # a value that asks for nothing is short
_SHORT = (
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "logit_bias",
)  # lists, typed, of which a client must not have millions made
_MAX_PRIORITY_BYTES = 32
_MAX_VALUES = 800_000  # of a body, which is decoded in one go: 20 ms in which Python stands still, with all streams
_MANY_BYTES = 2 * _MAX_VALUES  # less cannot hold so many
_MAX_SHORT_BYTES = 65536
_MAX_NUMBER_BYTES = 64
_CHUNK_BYTES = 65536  # of a list of numbers that are decoded at once

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")


@contextlib.contextmanager
def refusing_malformed(param: str | None = None) -> Iterator[None]:
    """What msgspec says of a client's JSON as Refusal 400 that names the field: `param`, or the one in the message."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise _invalid(str(error), param) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise Refusal(400, "invalid_json", "The body is nested too deeply.") from error


def parse_body(body: bytes, kind: type[S]) -> S:
    """Decode and validate a body; raises Refusal 400 that names the field."""
    if len(body) > _MANY_BYTES and sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:  # some may be in texts
        raise Refusal(400, "invalid_value", f"The body holds more than {_MAX_VALUES} commas, brackets and braces.")
    with refusing_malformed():
        request: S = _decode(body, _raw_first(kind))
    typed = {
        name: decode(value, kind, name)
        for names, decode in (
            (_SHORT, _decode_short),
            (_integers(kind), _decode_integer),
            (("priority",), _decode_priority),
        )
        for name in names
        if isinstance(value := getattr(request, name, None), Raw)
    }
    request = msgspec.structs.replace(request, **typed)
    refuse_fields(
        request,
        {
            name: neutral
            for name, neutral in UNSUPPORTED.items()
            if name not in kind.__struct_fields__ and not _is_none(getattr(request, DECLINED_BY.get(name, ""), UNSET))
        },
    )
    if isinstance(request, SamplingFields) and request.stream_options is not None and not request.stream:
        message = "`stream_options` is for streams only: set `stream` too, or leave it out."
        raise Refusal(400, "invalid_value", message, param="stream_options")
    return request


def _decode(body: bytes, kind: type[S]) -> S:
    try:
        request: S = msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        if str(error) != _TRUNCATED:
            raise
        # half of a surrogate pair near the end is called what it is then
        request = msgspec.json.decode(body + _PAIR * b" ", type=kind)
    return request


def without_raw(request: S) -> S:
    """The request without its raw members, which would keep the whole body in memory."""
    raw = {name: UNSET for name in request.__struct_fields__ if isinstance(getattr(request, name), Raw)}
    return msgspec.structs.replace(request, **raw)


def given(raw: Raw | UnsetType) -> Raw | None:
    """A raw member; None if it is missing or null."""
    return raw if isinstance(raw, Raw) and bytes(raw) != b"null" else None


def decode_raw(raw: Raw, kind: type[T], param: str) -> T:
    """A raw member as `kind`; raises Refusal 400 that names `param`."""
    with refusing_malformed(param):
        return msgspec.json.decode(raw, type=kind)


def first_elements(raw: Raw, limit: int, param: str) -> list[Raw]:
    """The first `limit` elements of a raw JSON array; those beyond are skipped, so that a million cost no objects.

    Raises Refusal 400 if it is no array.
    """
    found = decode_raw(raw, _bounded_array(limit), param)
    return [value for name in found.__struct_fields__ if isinstance(value := getattr(found, name), Raw)]


def token_ids(raw: Raw, param: str) -> "array[int]":
    """A raw JSON array of token ids, four bytes each; raises Refusal 400 if it is anything else."""
    ids, text, start = array("I"), bytes(raw), 0
    while start < len(text):
        end = text.find(b",", start + _CHUNK_BYTES)
        end = len(text) if end < 0 else end
        opening, closing = b"" if start == 0 else b"[", b"" if end == len(text) else b"]"
        ids.extend(decode_raw(Raw(opening + text[start:end] + closing), list[TokenId], param))
        start = end + 1
    del text
    return ids[:]  # as large as it must be: an array grows with room to spare


@functools.cache
def _raw_first(kind: type[S]) -> type[S]:
    """`kind` with every unsupported field that it does not define, its short lists and its integers, raw."""
    own = set(kind.__struct_fields__)
    names = (UNSUPPORTED.keys() - own) | (own & set(_SHORT)) | set(_integers(kind)) | (own & {"priority"})
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    fields: list[Any] = [(name, Raw | UnsetType, defaults.get(name, UNSET)) for name in sorted(names)]
    return msgspec.defstruct(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)  # type: ignore[return-value]


def _decode_priority(raw: Raw, kind: type[msgspec.Struct], name: str) -> int:
    """Never refused: front ends add it in whatever sense."""
    return bounded_priority(msgspec.json.decode(raw)) if len(bytes(raw)) <= _MAX_PRIORITY_BYTES else 0


def _decode_short(raw: Raw, kind: type[msgspec.Struct], name: str) -> Any:
    if len(bytes(raw)) > _MAX_SHORT_BYTES:
        raise Refusal(400, "invalid_value", f"`{name}` has more than {_MAX_SHORT_BYTES} bytes.", param=name)
    return decode_raw(raw, _hints(kind)[name], name)


def _decode_integer(raw: Raw, kind: type[msgspec.Struct], name: str) -> Any:
    """To JSON 2.0 is an integer, and clients whose language has one kind of number write it so."""
    if len(bytes(raw)) > _MAX_NUMBER_BYTES:
        raise Refusal(400, "invalid_value", f"`{name}` is no number of up to {_MAX_NUMBER_BYTES} bytes.", param=name)
    with refusing_malformed(name):
        value = msgspec.json.decode(raw)
        return msgspec.convert(
            int(value) if isinstance(value, float) and value.is_integer() else value, _hints(kind)[name]
        )


@functools.cache
def _integers(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    """The fields that hold one."""
    return tuple(name for name, hint in _hints(kind).items() if int in map(_plain, typing.get_args(hint)))


def _plain(hint: Any) -> Any:
    """Without its limits."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


@functools.cache
def _hints(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def _bounded_array(limit: int) -> type[msgspec.Struct]:
    """An array of which `limit` elements are kept."""
    fields: list[Any] = [(f"element_{number}", Raw | UnsetType, UNSET) for number in range(limit)]
    return msgspec.defstruct("Array", fields, array_like=True, frozen=True)


def _is_none(choice: object) -> bool:
    return isinstance(choice, Raw) and bytes(choice) == b'"none"'


def refuse_fields(request: msgspec.Struct, neutral_values: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises Refusal 400 for the first of these raw fields that is given and asks for something."""
    for name, neutral in neutral_values.items():
        if isinstance(raw := getattr(request, name, UNSET), Raw) and not _asks_for_nothing(raw, neutral):
            message = f"`{name}` is not supported by this engine: leave it out."
            raise Refusal(400, "unsupported_parameter", message, param=name)


def _asks_for_nothing(raw: Raw, neutral: tuple[Any, ...]) -> bool:
    """Equal to one of the neutral values, and a bool only if that is one: `"logprobs": 0` asks for something."""
    if len(bytes(raw)) > _MAX_NEUTRAL_BYTES:
        return False
    with refusing_malformed():
        value = msgspec.json.decode(raw)
    return value is None or any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def _invalid(message: str, param: str | None) -> Refusal:
    """msgspec writes "Expected `int`, got `str` - at `$.max_tokens`" or "... required field `messages`"."""
    problem, _, path = message.partition(" - at `$")
    if param is None:
        param = path.strip("`.").split(".")[0].split("[")[0] or None
    if param is None and "field `" in problem:
        param = problem.split("field `")[1].split("`")[0]
    where = f"`{param}`: " if param else ""
    return Refusal(400, "invalid_value", f"{where}{problem}.", param=param)
