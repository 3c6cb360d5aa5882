"""Grammars: JSON schemas, regular expressions, choices and Lark or GBNF grammars, as the one text that is compiled."""

import json
from collections.abc import Sequence

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

MAX_BYTES = 65_536
"""Of what a client sends as a schema or grammar."""

WHITESPACE = r" |\n {0,20}"
"""Between the tokens of JSON: enough to indent, and no more, since small models may never stop writing it."""


class GrammarError(Exception):
    """What was asked for is no grammar; the message is for whoever sent it."""


def json_object(whitespace: str | None = None) -> str:
    """Any JSON object."""
    return json_schema('{"type": "object"}', strict=True, whitespace=whitespace)


def json_schema(schema: str, *, strict: bool, whitespace: str | None = None) -> str:
    """JSON of a schema, which is JSON text. What is not supported of it is an error if `strict`, else no constraint."""
    _check_size(schema)
    pattern = f"(?:{WHITESPACE if whitespace is None else whitespace})?"
    try:
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": pattern, "lenient": not strict}
        )
    except ValueError as error:
        raise GrammarError(f"The schema is no JSON object: {error}") from error


def regex(pattern: str) -> str:
    """Text that a regular expression matches as a whole."""
    _check_size(pattern)
    return LLMatcher.grammar_from_regex(pattern)


def choice(options: Sequence[str]) -> str:
    """One of these texts."""
    if not options or not all(options):
        raise GrammarError("A choice needs options, none of them empty.")
    return lark("start: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in options))


def lark(text: str) -> str:
    """A grammar in Lark's notation, as of llguidance, or in GBNF."""
    _check_size(text)
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # its parser of GBNF raises nothing narrower
        raise GrammarError(f"The grammar cannot be read: {error}") from error


def _check_size(text: str) -> None:
    if len(text.encode()) > MAX_BYTES:
        raise GrammarError(f"It has more than {MAX_BYTES} bytes.")
