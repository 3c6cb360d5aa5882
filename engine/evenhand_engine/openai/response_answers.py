"""The answer of /v1/responses, as the published document describes it; held to it by the tests, see `answers`."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from evenhand_engine.openai.answers import PromptTokensDetails


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class ResponseUsageDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: ResponseUsageDetails
    total_tokens: int


class OutputPart(msgspec.Struct, frozen=True):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


class OutputItem(msgspec.Struct, frozen=True):
    """A message, reasoning or a call of a function."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | UnsetType = UNSET
    content: list[OutputPart] | UnsetType = UNSET
    summary: list[Any] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class Response(msgspec.Struct, frozen=True):
    """Of /v1/responses. What the request said of these fields is repeated."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    output: list[OutputItem]
    usage: ResponseUsage
    tools: Raw
    tool_choice: Raw
    text: Raw
    metadata: Raw
    reasoning: Raw
    instructions: str | None
    max_output_tokens: int | None
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float | None
    top_p: float | None
    truncation: Literal["disabled"]
    user: str | None
