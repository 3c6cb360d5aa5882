"""A JSON object's members, decoded one level deep: values stay the bytes that the client wrote. Pure.

Each member takes some 170 bytes and 0.8 µs, so what has a great many would fill the memory and hold up everybody.
"""

from typing import Any

import msgspec

from evenhand_engine.errors import Refusal

Members = dict[str, msgspec.Raw]

_MAX_MEMBERS = 16_384
_MAX_VALUE_BYTES = 4096  # two of which may become an object of sixty
_LARGE = (  # members that may be long and have many of their own
    *("messages", "prompt", "prompts", "input", "inputs", "instances", "text", "texts", "documents", "query"),
    *("queries", "tools", "functions", "response_format", "image_data", "input_extra", "content", "instructions"),
    *("system", "suffix", "input_prefix", "input_suffix"),
)
_Large: Any = msgspec.defstruct("_Large", [(name, msgspec.Raw, msgspec.Raw()) for name in _LARGE])


def decode_members(raw: bytes | msgspec.Raw) -> Members:
    """Raises Refusal 400 if there may be too many, and msgspec's errors where it is no object."""
    num_colons = bytes(raw).count(b":")  # as many as members, or more
    if num_colons > _MAX_MEMBERS:
        large = msgspec.json.decode(raw, type=_Large)
        num_colons -= sum(bytes(getattr(large, name)).count(b":") for name in _LARGE)
    if num_colons > _MAX_MEMBERS:
        raise Refusal(400, "invalid_value", f"An object of the body has more than {_MAX_MEMBERS} members, or may have.")
    return msgspec.json.decode(raw, type=Members)


def small_value(raw: msgspec.Raw) -> Any:
    """What it says; None where it cannot be read, or is too large to be of use."""
    if len(bytes(raw)) > _MAX_VALUE_BYTES:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def is_named(members: Members, name: str) -> bool:
    """Whether there is such a member, and it is not null."""
    return name in members and bytes(members[name]) != b"null"
