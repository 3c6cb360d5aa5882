"""Bodies of /v1/responses: what they ask, as the body of a chat that asks the same; nothing is kept between requests."""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from evenhand_engine.errors import Refusal
from evenhand_engine.openai.bodies import decode_raw, first_elements, given, refuse_fields
from evenhand_engine.openai.members import Object, ToolChoice, holds
from evenhand_engine.openai.schema import Positive, UserName

_MAX_ITEMS = 4096
_MAX_ECHOED_BYTES = 65_536  # of what the answer repeats: tools, text, metadata
_REFUSED: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
PARAMS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "verbosity": "text",
    "reasoning_effort": "reasoning",
}
"""Fields of the body, by those of the chat body that they became."""


class ResponseReasoning(msgspec.Struct, frozen=True):
    effort: str | None = None


class ResponseText(msgspec.Struct, frozen=True):
    format: Object | None = None
    verbosity: str | None = None


class InputPart(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """A message, or what came of a call."""

    type: str = "message"
    role: str | None = None
    content: Annotated[Raw, holds(str, list[InputPart])] | UnsetType = UNSET
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Annotated[Raw, holds(str, list[InputPart])] | UnsetType = UNSET


class ResponseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/responses."""

    input: Annotated[Raw, holds(str, list[InputItem])] | UnsetType
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    tools: Annotated[Raw, holds(list[Object])] | UnsetType = UNSET
    tool_choice: Annotated[Raw, holds(ToolChoice, Object)] | UnsetType = UNSET
    parallel_tool_calls: bool | None = None
    text: Annotated[Raw, holds(ResponseText)] | UnsetType = UNSET
    reasoning: Annotated[Raw, holds(ResponseReasoning)] | UnsetType = UNSET
    metadata: Annotated[Raw, holds(Object)] | UnsetType = UNSET
    user: UserName | None = None
    include: Annotated[Raw, holds(list[str])] | UnsetType = UNSET
    access_programs: Raw | UnsetType = UNSET
    background: Raw | UnsetType = UNSET
    context_management: Raw | UnsetType = UNSET
    conversation: Raw | UnsetType = UNSET
    image: Raw | UnsetType = UNSET
    max_tool_calls: Raw | UnsetType = UNSET
    previous_response_id: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    top_logprobs: Raw | UnsetType = UNSET
    truncation: Raw | UnsetType = UNSET


def as_chat(body: ResponseRequest) -> bytes:
    """The chat body; raises Refusal 400 that names the field."""
    refuse_fields(body, _REFUSED)
    _check_include(body)
    if (metadata := _echoed(body.metadata, "metadata")) is not None:
        decode_raw(metadata, Object, "metadata")
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls,
        "user": body.user,
    }
    if (tools := _echoed(body.tools, "tools")) is not None:
        chat["tools"] = [_tool(part) for part in decode_raw(tools, list[dict[str, Any]], "tools")]
    if (choice := given(body.tool_choice)) is not None:
        chat["tool_choice"] = _tool_choice(choice)
    if (text := _echoed(body.text, "text")) is not None:
        asked = decode_raw(text, ResponseText, "text")
        chat["response_format"], chat["verbosity"] = _response_format(asked.format), asked.verbosity
    if (reasoning := given(body.reasoning)) is not None:
        chat["reasoning_effort"] = decode_raw(reasoning, ResponseReasoning, "reasoning").effort
    return msgspec.json.encode({name: value for name, value in chat.items() if value is not None})


def _check_include(body: ResponseRequest) -> None:
    """Most of what it may name comes of tools that there are none of here."""
    asked = given(body.include)
    if asked is not None and "message.output_text.logprobs" in decode_raw(asked, list[str], "include"):
        message = "`include` cannot have log probabilities here: leave them out, or ask /v1/chat/completions."
        raise Refusal(400, "unsupported_parameter", message, param="include")


def echoed(body: ResponseRequest) -> dict[str, Any]:
    """What the answer repeats of the body."""
    nothing: dict[str, bytes] = {"tools": b"[]", "tool_choice": b'"auto"', "text": b'{"format":{"type":"text"}}'}
    nothing |= {"metadata": b"{}", "reasoning": b"null"}
    raws = {name: _echoed(getattr(body, name), name) for name in nothing}
    return {
        **{name: Raw(bytes(nothing[name] if raw is None else raw)) for name, raw in raws.items()},
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _echoed(raw: Raw | UnsetType, name: str) -> Raw | None:
    found = given(raw)
    if found is not None and len(bytes(found)) > _MAX_ECHOED_BYTES:
        raise _invalid(f"`{name}` has more than {_MAX_ECHOED_BYTES} bytes.", name)
    return found


def _messages(body: ResponseRequest) -> list[dict[str, Any]]:
    raw = given(body.input)
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if raw is None:
        raise _invalid("`input` is missing.", "input")
    if bytes(raw)[:1] == b'"':
        return [*messages, {"role": "user", "content": decode_raw(raw, str, "input")}]
    parts = first_elements(raw, _MAX_ITEMS + 1, "input")
    if len(parts) > _MAX_ITEMS:
        raise _invalid(f"`input` holds more than {_MAX_ITEMS} items.", "input")
    for part in parts:
        item = decode_raw(part, InputItem, "input")
        if item.type == "function_call" and messages and messages[-1].get("tool_calls"):
            messages[-1]["tool_calls"].append(_call(item))  # parallel calls are one message to a chat
        elif item.type != "reasoning":  # what was thought before is not shown again
            messages.append(_message(item))
    return messages


def _message(item: InputItem) -> dict[str, Any]:
    match item.type:
        case "message" if item.role is not None:
            return {"role": item.role, "content": _content(given(item.content))}
        case "function_call":
            return {"role": "assistant", "content": "", "tool_calls": [_call(item)]}
        case "function_call_output":
            return {"role": "tool", "tool_call_id": item.call_id, "content": _content(given(item.output))}
    raise _invalid(f"An item of type {item.type[:50]!r} is not supported, or has no role.", "input")


def _call(item: InputItem) -> dict[str, Any]:
    function = {"name": item.name or "", "arguments": item.arguments or "{}"}
    return {"id": item.call_id, "type": "function", "function": function}


def _content(raw: Raw | None) -> str | list[dict[str, str]]:
    if raw is None or bytes(raw)[:1] == b'"':
        return "" if raw is None else decode_raw(raw, str, "input")
    parts = decode_raw(raw, list[InputPart], "input")
    if unknown := [part.type for part in parts if part.type not in ("input_text", "output_text", "text")]:
        raise _invalid(f"Content of type {unknown[0][:50]!r} is not supported: text.", "input")
    return [{"type": "text", "text": part.text} for part in parts]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Flat here, nested in chats."""
    if tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(raw: Raw) -> Any:
    if bytes(raw)[:1] == b'"':
        return decode_raw(raw, str, "tool_choice")
    choice = decode_raw(raw, dict[str, Any], "tool_choice")
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(form: dict[str, Any] | None) -> dict[str, Any] | None:
    """Flat here, nested in chats."""
    if form is None or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _invalid(message: str, param: str) -> Refusal:
    return Refusal(400, "invalid_value", message, param=param)
