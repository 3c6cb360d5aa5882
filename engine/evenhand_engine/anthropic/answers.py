"""Answers of /v1/messages and /v1/messages/count_tokens, as the published document describes them; held to it by the tests."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class MessageUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageBlock(msgspec.Struct, frozen=True):
    """Text, what was thought, or the use of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET


class Message(msgspec.Struct, frozen=True):
    """Of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int
