"""ChatTemplate: a model's own program that writes a conversation as one prompt, run as `transformers` runs it.

Templates come with the model, so they run in a sandbox; what they raise is about the messages.
"""

import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from evenhand_engine.errors import StartupError
from evenhand_engine.text.tool_calls import ToolFormat, detect_format

TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"


class ChatTemplateError(Exception):
    """The chat template does not accept these messages; the message is the template's own."""


class ChatTemplate:
    """A model's templates, compiled: one by default, and perhaps others by name, like "tool_use"."""

    def __init__(
        self,
        templates: Mapping[str, jinja2.Template],
        variables: Mapping[str, str],
        tool_format: ToolFormat | None = None,
    ) -> None:
        """`variables` are there in every template: the spellings of special tokens by name, like `bos_token`."""
        self.tool_format = tool_format
        self._templates = templates
        self._variables = variables

    @classmethod
    def load(
        cls, directory: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
    ) -> Self | None:
        """From the template files, else from `tokenizer_config.json`; None if there are none. Raises StartupError."""
        try:
            sources = _sources(directory, tokenizer_config)
            environment = _environment()
            templates = {name: environment.from_string(source) for name, source in sources.items()}
        except (jinja2.TemplateError, OSError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise StartupError(f"the chat template of {directory} is broken: {error}") from error
        source = sources.get("tool_use", sources.get("default", ""))
        return cls(templates, special_tokens, detect_format(source)) if templates else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; raises ChatTemplateError if the template refuses it.

        With `continue_final_message` it ends with the last message, as the template writes it.
        """
        shown = [_for_template(message) for message in messages]
        mark = f"{secrets.token_hex(16)} "  # its end tells whether the template trims
        if continue_final_message:
            shown[-1] = _marked(shown[-1], mark)
        everything = {"tools": None, "documents": None, **self._variables, **(variables or {})}
        everything |= {"messages": shown, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._template(everything["tools"]).render(everything)
        except Exception as error:  # a template is the model's program: whatever it raises is about these messages
            raise ChatTemplateError(str(error)) from error
        return _cut_at(mark, text, shown[-1]) if continue_final_message else text

    def _template(self, tools: Any) -> jinja2.Template:
        for name in ("tool_use", "default") if tools is not None else ("default",):
            if name in self._templates:
                return self._templates[name]
        raise ChatTemplateError(f"the model has chat templates {', '.join(self._templates)}, none of them by default")


class _Arguments(dict[str, Any]):
    """A tool call's arguments: an object where a template reads one, and the JSON text as it was where it writes it."""

    def __init__(self, text: str, value: dict[str, Any]) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """No tool calls are none at all, and those there are have objects as arguments."""
    fields = dict(message)
    if not fields.get("tool_calls"):
        fields.pop("tool_calls", None)
    else:
        fields["tool_calls"] = [_tool_call(call) for call in fields["tool_calls"]]
    return fields


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return call
    if not isinstance(value, dict):
        return call
    return {**call, "function": {**function, "arguments": _Arguments(arguments, value)}}


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    if not isinstance(content := message.get("content"), str):
        raise ChatTemplateError("the final message has no text that could be continued")
    return {**message, "content": content + mark}


def _cut_at(mark: str, text: str, message: Mapping[str, Any]) -> str:
    """`text` up to the mark. A template that trims the message would have trimmed it without the mark too."""
    at = text.rfind(mark.strip())
    prompt = text[: max(0, at)]
    if at < 0 or not prompt.rstrip().endswith(message["content"].removesuffix(mark).strip()):
        raise ChatTemplateError("the chat template changes the final message, so it cannot be continued")
    return prompt if text.startswith(mark, at) else prompt.rstrip()


def _sources(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """By name. Files go before the config; there, several are written [{"name": ..., "template": ...}]."""
    files = {path.stem: path for path in (directory / NAMED_TEMPLATES).glob("*.jinja")}
    if (directory / TEMPLATE_FILE).is_file():
        files["default"] = directory / TEMPLATE_FILE
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}
    return {} if source is None else {"default": source}


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; for a prompt it only passes them on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Templates are written for these settings."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter this escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
