"""Bodies of /v1/messages, as the body of a chat that asks the same."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from evenhand_engine.errors import Refusal
from evenhand_engine.openai.bodies import decode_raw, first_elements, given, refuse_fields
from evenhand_engine.openai.members import Object, holds
from evenhand_engine.openai.schema import Positive, UserName

_MAX_MESSAGES = 4096
_REFUSED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
}
PARAMS = {
    "chat_template_kwargs": "thinking",
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking",
    "user": "metadata",
}
"""Fields of the body, by those of the chat body that they became."""


class MessageMetadata(msgspec.Struct, frozen=True):
    user_id: UserName | None = None


class InputBlock(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    text: str = ""
    id: str = ""
    name: str = ""
    input: Annotated[Raw, holds(Object)] | UnsetType = UNSET
    tool_use_id: str = ""
    content: Annotated[Raw, holds(str, list[Object])] | UnsetType = UNSET


class InputMessage(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: Annotated[Raw, holds(str, list[InputBlock])] | UnsetType = UNSET


class MessageTool(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    type: str = "custom"
    description: str | None = None
    input_schema: Annotated[Raw, holds(Object)] | UnsetType = UNSET
    strict: bool | None = None


class MessageToolChoice(msgspec.Struct, frozen=True):
    type: str
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class OutputConfig(msgspec.Struct, frozen=True):
    format: Object | None = None
    effort: str | None = None


class Thinking(msgspec.Struct, frozen=True):
    type: str
    budget_tokens: Positive | None = None


class CountTokensRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    messages: Annotated[Raw, holds(list[InputMessage])] | UnsetType
    model: str | None = None
    max_tokens: Positive | None = None
    system: Annotated[Raw, holds(str, list[InputBlock])] | UnsetType = UNSET
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[Raw, holds(list[str])] | UnsetType = UNSET
    stream: bool | None = None
    tools: Annotated[Raw, holds(list[MessageTool])] | UnsetType = UNSET
    tool_choice: Annotated[Raw, holds(MessageToolChoice)] | UnsetType = UNSET
    output_config: Annotated[Raw, holds(OutputConfig)] | UnsetType = UNSET
    output_format: Annotated[Raw, holds(Object)] | UnsetType = UNSET
    metadata: MessageMetadata | None = None
    container: Raw | UnsetType = UNSET
    mcp_servers: Raw | UnsetType = UNSET
    thinking: Annotated[Raw, holds(Thinking)] | UnsetType = UNSET


class MessageRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Positive


def as_chat(body: CountTokensRequest, *, tells_reasoning: bool = True) -> bytes:
    """The chat body; raises Refusal 400 that names the field. `tells_reasoning`: what the model thinks is told from what it says."""
    refuse_fields(body, _REFUSED)
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": None if (stop := given(body.stop_sequences)) is None else stop,
        "user": None if body.metadata is None else body.metadata.user_id,
    }
    if (tools := given(body.tools)) is not None:
        chat["tools"] = [_tool(tool) for tool in decode_raw(tools, list[MessageTool], "tools")]
    if (choice := given(body.tool_choice)) is not None:
        chat |= _tool_choice(decode_raw(choice, MessageToolChoice, "tool_choice"))
    if (thinking := given(body.thinking)) is not None:
        chat |= _thinking(decode_raw(thinking, Thinking, "thinking"), tells_reasoning)
    if (output := given(body.output_config)) is not None:
        config = decode_raw(output, OutputConfig, "output_config")
        chat["reasoning_effort"] = config.effort
        if config.format is not None:
            chat["response_format"] = _response_format(config.format)
    if (output := given(body.output_format)) is not None:  # its name before it was part of `output_config`
        chat["response_format"] = _response_format(decode_raw(output, Object, "output_format"))
    if chat["messages"] and _begins_answer(chat["messages"][-1]):
        chat["continue_final_message"] = True
    return msgspec.json.encode({name: value for name, value in chat.items() if value is not None})


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    named = {"name": "output", "schema": form.get("schema"), "strict": True}
    return {"type": form.get("type"), "json_schema": named}


def _begins_answer(message: dict[str, Any]) -> bool:
    """Whether this last message is the beginning of the answer, which is to go on from there."""
    return message["role"] == "assistant" and "tool_calls" not in message


def _thinking(asked: Thinking, tells_reasoning: bool) -> dict[str, Any]:
    """The variable by which chat templates are told whether the model is to think first, and how much it may; adaptive: as
    they like."""
    if asked.type not in ("enabled", "adaptive", "disabled"):
        raise _invalid("`thinking.type` is enabled, adaptive or disabled.", "thinking")
    if asked.type == "enabled" and not tells_reasoning:
        message = (
            "`thinking` cannot be told from the answer here: leave it out, or start the server with --reasoning-parser."
        )
        raise Refusal(400, "unsupported_parameter", message, param="thinking")
    if asked.type == "adaptive":
        return {}
    is_enabled = asked.type == "enabled"
    budget = asked.budget_tokens if is_enabled else None
    return {"chat_template_kwargs": {"enable_thinking": is_enabled}, "thinking_token_budget": budget}


def _messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if (system := given(body.system)) is not None:
        messages.append({"role": "system", "content": _text(_blocks(system, "system"), "system")})
    raw = given(body.messages)
    parts = [] if raw is None else first_elements(raw, _MAX_MESSAGES + 1, "messages")
    if len(parts) > _MAX_MESSAGES:
        raise _invalid(f"`messages` holds more than {_MAX_MESSAGES} messages.", "messages")
    for part in parts:
        message = decode_raw(part, InputMessage, "messages")
        messages += _turn(message.role, _blocks(given(message.content), "messages"))
    return messages


def _turn(role: str, blocks: list[InputBlock]) -> list[dict[str, Any]]:
    """What came of calls is a message of its own to a chat; what was thought before is not shown again."""
    results = [block for block in blocks if block.type == "tool_result"]
    calls = [block for block in blocks if block.type == "tool_use"]
    others = [
        block for block in blocks if block.type not in ("tool_result", "tool_use", "thinking", "redacted_thinking")
    ]
    messages: list[dict[str, Any]] = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": _text(_blocks(given(block.content), "messages"), "messages"),
        }
        for block in results
    ]
    if others or calls or not results:
        message: dict[str, Any] = {"role": role, "content": _text(others, "messages")}
        if calls:
            message["tool_calls"] = [_call(block) for block in calls]
        messages.append(message)
    return messages


def _call(block: InputBlock) -> dict[str, Any]:
    arguments = given(block.input)
    text = "{}" if arguments is None else bytes(arguments).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": text}}


def _blocks(raw: Raw | None, param: str) -> list[InputBlock]:
    if raw is None:
        return []
    if bytes(raw)[:1] == b'"':
        return [InputBlock(type="text", text=decode_raw(raw, str, param))]
    return decode_raw(raw, list[InputBlock], param)


def _text(blocks: list[InputBlock], param: str) -> str:
    if unknown := [block.type for block in blocks if block.type != "text"]:
        raise _invalid(f"A block of type {unknown[0][:50]!r} is not supported here: text.", param)
    return "\n".join(block.text for block in blocks)


def _tool(tool: MessageTool) -> dict[str, Any]:
    if tool.type != "custom":
        message = f"A tool of type {tool.type[:50]!r} is not supported: only your own."
        raise Refusal(400, "unsupported_parameter", message, param="tools")
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": given(tool.input_schema),
        "strict": tool.strict,
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _tool_choice(choice: MessageToolChoice) -> dict[str, Any]:
    named = {"type": "function", "function": {"name": choice.name}}
    words: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none", "tool": named}
    if choice.type not in words:
        raise _invalid("`tool_choice.type` is auto, any, none or tool.", "tool_choice")
    return {"tool_choice": words[choice.type], "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _invalid(message: str, param: str) -> Refusal:
    return Refusal(400, "invalid_value", message, param=param)
