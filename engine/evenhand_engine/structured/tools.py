"""Tool calls as a grammar: which functions may be called, with arguments that fit their schemas, in the model's format."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from evenhand_engine.structured.grammars import WHITESPACE, GrammarError, lark
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_engine.text.tool_calls import ToolFormat

_TEXT = "/(.|\\n)*/"


class Function(NamedTuple):
    """One that may be called.

    Attributes:
        parameters: JSON of the schema of its arguments.
        is_strict: what is not supported of the schema is an error, else no constraint.
    """

    name: str
    parameters: str = '{"type": "object"}'
    is_strict: bool = False


class Answer(NamedTuple):
    """JSON that is said instead of a call.

    Attributes:
        schema: JSON of what it must look like.
        is_strict: as a function's.
    """

    schema: str
    is_strict: bool


def calls(
    form: ToolFormat,
    functions: Sequence[Function],
    tokenizer: Tokenizer,
    *,
    is_required: bool,
    is_parallel: bool,
    answer: Answer | None = None,
) -> str:
    """The grammar of an output that is calls of these functions (`is_required`), or text with calls in it; or, with an `answer`,
    either calls or that."""
    begin = _terminals(form.begin, form, tokenizer)
    more = f"({_terminals(form.between, form, tokenizer)} call)*" if is_parallel else ""
    close = _terminals(form.close, form, tokenizer)
    rules = [f"sequence: {begin} call {more} {close}"]
    marker = form.markers[0] if form.markers else ""
    if is_required or answer is not None:
        other = "" if answer is None or is_required else " | answer"
        rules.append(f"start: {_terminals(marker, form, tokenizer)} sequence{other}")
    elif not marker:
        rules += ["start: OTHER | sequence", "OTHER: /([^{](.|\\n)*)?/"]
    else:
        times = "*" if is_parallel else "?"
        rules += [f"start: (head sequence){times} TEXT", f"TEXT: {_TEXT}"]
        token_id = tokenizer.special_id(marker)
        rules.append(f"head[lazy]: {_TEXT} {json.dumps(marker)}" if token_id is None else f"head: TEXT <[{token_id}]>")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    for number, function in enumerate(functions):
        rules.append(f"call_{number}: {_call(function, number, form, tokenizer)}")
        told = f"The parameters of {function.name}"
        rules.append(f"arguments_{number}: %json {_schema(function.parameters, told, is_strict=function.is_strict)}")
    if answer is not None and not is_required:
        rules.append(f"answer: %json {_schema(answer.schema, 'The schema of the answer', is_strict=answer.is_strict)}")
    return lark("\n".join(rules))


def _call(function: Function, number: int, form: ToolFormat, tokenizer: Tokenizer) -> str:
    if form.writes_names:
        return f"{json.dumps(function.name)} {_terminals(form.name_mark, form, tokenizer)} arguments_{number}"
    opening = json.dumps(f'{{"name": {json.dumps(function.name)}, "{form.arguments}": ')
    return f'{opening} arguments_{number} "}}"'


def _schema(text: str, told: str, *, is_strict: bool) -> str:
    """`told`: what an error calls it."""
    try:
        schema = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise GrammarError(f"{told} cannot be read as a JSON object: {error}") from error
    except RecursionError as error:
        raise GrammarError(f"{told} cannot be read: nested too deeply.") from error
    options = {"whitespace_pattern": f"(?:{WHITESPACE})?", "lenient": not is_strict}
    return msgspec.json.encode({**schema, "x-guidance": options}).decode()


def _terminals(text: str, form: ToolFormat, tokenizer: Tokenizer) -> str:
    """Special tokens by their ids, the text between them as it is."""
    marks = (*form.markers, form.end, form.name_mark)
    special = [mark for mark in marks if mark and tokenizer.special_id(mark) is not None]
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    return " ".join(
        f"<[{tokenizer.special_id(part)}]>" if part in special else json.dumps(part) for part in parts if part
    )
