"""Members of bodies that are large or of several shapes: kept raw when a body is decoded, and decoded as these when they are needed.

`holds` says of a raw member what it is decoded as: for whoever reads the code, and for the published document.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType


def holds(*kinds: Any) -> Meta:
    """Of a raw member: it is one of these, or null, which is as if it were missing."""
    return Meta(extra={"kinds": kinds})


TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Choices = Annotated[list[str], Meta(max_length=4096)]
Object = dict[str, Any]


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation."""

    role: str
    content: Annotated[Raw, holds(str, list[TextPart])] | UnsetType = UNSET
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[Raw, holds(list[Object])] | UnsetType = UNSET  # of any shape: for the template alone
    tool_call_id: str | None = None


class NamedSchema(msgspec.Struct, frozen=True):
    """OpenAI's; without `strict` what is not supported of a schema does not constrain."""

    schema: Annotated[Raw, holds(Object, str)] | UnsetType = UNSET
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """`type` is text, json_object or json_schema."""

    type: str
    json_schema: NamedSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`; its `guided_*` fields are the same with another name."""

    json: Annotated[Raw, holds(Object, str)] | UnsetType = UNSET
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None


class ToolFunction(msgspec.Struct, frozen=True):
    """`parameters` is the schema of its arguments."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    parameters: Annotated[Raw, holds(Object)] | UnsetType = UNSET
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """`type` is function."""

    type: str
    function: ToolFunction | UnsetType = UNSET


class FunctionName(msgspec.Struct, frozen=True):
    name: str


class NamedToolChoice(msgspec.Struct, frozen=True):
    """`type` is function."""

    type: str
    function: FunctionName | UnsetType = UNSET


ToolChoice = Literal["auto", "none", "required"]
