"""Tools: the functions that a chat's model may call, and which of them it must."""

from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, Raw

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.openai.bodies import decode_raw, first_elements, given
from evenhand_engine.openai.members import NamedToolChoice, Tool
from evenhand_engine.openai.schema import ChatCompletionRequest
from evenhand_engine.structured import grammars
from evenhand_engine.structured import tools as structured_tools
from evenhand_engine.structured.grammars import GrammarError
from evenhand_engine.structured.tools import Answer, Function
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_engine.text.tool_calls import FORMATS, ToolFormat

_MAX_TOOLS = 128
_NOTHING = b'{"type": "object", "properties": {}}'


@dataclass(frozen=True, slots=True)
class Tools:
    """What a body offers.

    Attributes:
        form: in which the model writes calls.
        functions: that may be called.
        is_required: the answer must be a call.
        is_named: of one function that the body names.
        is_parallel: it may be several.
    """

    form: ToolFormat
    functions: tuple[Function, ...]
    is_required: bool
    is_named: bool
    is_parallel: bool

    @property
    def takes_answer(self) -> bool:
        """Whether one grammar can have calls and an answer in JSON: where calls have a marker to begin with, or no answer may come."""
        return self.is_required or bool(self.form.markers)

    def grammar(self, tokenizer: Tokenizer, answer: Answer | None = None) -> str | None:
        """What the output must look like; None where the model is free to write what it likes. Raises Refusal 400.

        `answer`: what it must look like where it is no call.
        """
        if not self.is_required and answer is None and not any(function.is_strict for function in self.functions):
            return None
        try:
            return structured_tools.calls(
                self.form,
                self.functions,
                tokenizer,
                is_required=self.is_required,
                is_parallel=self.is_parallel and not self.is_named,
                answer=answer,
            )
        except GrammarError as error:
            raise _invalid(f"`tools`: {error}", "tools", code="invalid_grammar") from error


def tool_format(service: EngineService) -> ToolFormat | None:
    """How the model writes calls; None: it does not."""
    name = service.settings.tool_call_parser
    return service.tokenizer.tool_format if name == "auto" else FORMATS.get(name)


def read_tools(body: ChatCompletionRequest, form: ToolFormat | None) -> Tools | None:
    """The tools of a body, None without any; raises Refusal 400. `form`: how the model writes calls, None: it does not."""
    raw, choice = given(body.tools), given(body.tool_choice)
    parts = [] if raw is None else first_elements(raw, _MAX_TOOLS + 1, "tools")
    named = None if choice is None else _choice(choice)
    if raw is None or not parts:
        if named not in (None, "auto", "none"):
            raise _invalid("`tool_choice` needs `tools`.", "tool_choice")
        return None
    if named == "none":
        return None
    if len(parts) > _MAX_TOOLS:
        raise _invalid(f"`tools` holds more than {_MAX_TOOLS}.", "tools")
    if len(bytes(raw)) > grammars.MAX_BYTES:
        raise _invalid(f"`tools` has more than {grammars.MAX_BYTES} bytes.", "tools")
    if form is None:
        message = "This model's chat template takes no tools: leave `tools` out."
        raise _invalid(message, "tools", code="unsupported_parameter")
    functions = tuple(_function(part) for part in parts)
    is_named = named not in (None, "auto", "required")
    if is_named:
        name = named.removeprefix("function ") if named else ""
        functions = tuple(function for function in functions if function.name == name)
        if not functions:
            raise _invalid(f"`tool_choice` names {name[:64]!r}, which is none of the tools.", "tool_choice")
    return Tools(
        form,
        functions,
        is_required=is_named or named == "required",
        is_named=is_named,
        is_parallel=body.parallel_tool_calls is not False,
    )


def _choice(raw: Raw) -> str:
    """auto, none, required, or "function NAME"."""
    if bytes(raw)[:1] == b'"':
        word = decode_raw(raw, str, "tool_choice")
        if word not in ("auto", "none", "required"):
            raise _invalid("`tool_choice` is auto, none, required or names a function.", "tool_choice")
        return word
    choice = decode_raw(raw, NamedToolChoice, "tool_choice")
    if choice.type != "function" or choice.function is UNSET:
        raise _invalid("`tool_choice` names a function, or is auto, none or required.", "tool_choice")
    return f"function {choice.function.name}"


def _function(raw: Raw) -> Function:
    tool = decode_raw(raw, Tool, "tools")
    if tool.type != "function" or tool.function is UNSET:
        message = f"A tool's type {tool.type[:50]!r} is not supported: function."
        raise _invalid(message, "tools", code="unsupported_parameter")
    function = tool.function
    parameters = given(function.parameters)
    text = (_NOTHING if parameters is None else bytes(parameters)).decode()
    return Function(function.name, text, bool(function.strict))


def _invalid(message: str, param: str, *, code: str = "invalid_value") -> Refusal:
    return Refusal(400, code, message, param=param)


def definitions(body: ChatCompletionRequest, tools: Tools | None) -> dict[str, Any]:
    """The variable that shows a chat template the tools that `read_tools` has checked."""
    raw = given(body.tools)
    return {} if tools is None or raw is None else {"tools": decode_raw(raw, list[dict[str, Any]], "tools")}
