"""Structure: what a body says that its output must look like, in any of the ways in which clients say it, as one grammar."""

from typing import NamedTuple

from msgspec import Raw

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.openai.bodies import decode_raw, given
from evenhand_engine.openai.members import Choices, ResponseFormat, StructuredOutputs
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.structured import grammars
from evenhand_engine.structured.grammars import GrammarError
from evenhand_engine.structured.tools import Answer

_FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


class Structure(NamedTuple):
    """What an output must look like, and the field that says so.

    Attributes:
        answer: of a grammar of calls, or else of what `response_format` asks for, the grammar of that alone.
    """

    grammar: str
    param: str
    answer: str | None = None


async def check_structure(service: EngineService, tenant_id: str, structure: Structure | None) -> None:
    """Raises Refusal 400 for a grammar that cannot be compiled. Never on the event loop: a short one may take long."""
    if structure is None:
        return
    grammar, param, answer = structure
    try:
        await service.compute_aside(tenant_id, lambda: service.compiler.compile(tenant_id, grammar))
    except GrammarError as error:
        if answer is not None:
            await check_structure(
                service, tenant_id, Structure(answer, "response_format")
            )  # which it may be the fault of
        raise Refusal(400, "invalid_grammar", f"`{param}` cannot be followed: {error}", param=param) from error


def read_answer(body: SamplingFields) -> Answer | None:
    """The JSON that `response_format` asks for. Raises Refusal 400."""
    if (raw := given(body.response_format)) is None:
        return None
    answer = _answer(decode_raw(_checked(raw, "response_format"), ResponseFormat, "response_format"))
    if answer is not None:
        _grammar(answer, body)  # else what goes into one grammar with it would be blamed
    return answer


def read_structure(
    service: EngineService, body: SamplingFields, *, of_tools: str | None = None, answer: Answer | None = None
) -> Structure | None:
    """None where the output is free. `of_tools`: the grammar of its calls, and of this `answer`.

    Raises Refusal 400 that names the field: what it holds is no grammar, or the engine knows none.
    """
    asked = [
        (name, text)
        for name in _FIELDS
        if not (answer is not None and name == "response_format")
        and (raw := given(getattr(body, name))) is not None
        and (text := _read(name, _checked(raw, name), body)) is not None
    ]
    if of_tools is not None:
        asked.insert(0, ("tools", of_tools))
    if not asked:
        return None
    (name, grammar), *more = asked
    if more:
        message = f"`{name}` and `{more[0][0]}` exclude each other."
        raise Refusal(400, "invalid_value", message, param=more[0][0])
    for other in ("min_tokens", "allowed_token_ids", "bad_words"):
        if getattr(body, other):
            message = f"`{other}` and `{name}` exclude each other: together they may leave no token."
            raise Refusal(400, "invalid_value", message, param=other)
    if not service.info.knows_grammars:
        message = f"`{name}` is not supported on this engine's device: leave it out."
        raise Refusal(400, "unsupported_parameter", message, param=name)
    return Structure(grammar, name, answer and _grammar(answer, body))


def _checked(raw: Raw, name: str) -> Raw:
    if len(bytes(raw)) > grammars.MAX_BYTES:
        raise Refusal(400, "invalid_value", f"`{name}` has more than {grammars.MAX_BYTES} bytes.", param=name)
    return raw


def _read(name: str, raw: Raw, body: SamplingFields) -> str | None:
    whitespace = body.guided_whitespace_pattern
    try:
        match name:
            case "response_format":
                answer = _answer(decode_raw(raw, ResponseFormat, name))
                return answer and _grammar(answer, body)
            case "structured_outputs":
                return _structured(decode_raw(raw, StructuredOutputs, name))
            case "guided_json":
                return _schema(raw, name, strict=True, whitespace=whitespace)
            case "guided_regex":
                return grammars.regex(decode_raw(raw, str, name))
            case "guided_choice":
                return grammars.choice(decode_raw(raw, Choices, name))
            case _:
                return grammars.lark(decode_raw(raw, str, name))
    except GrammarError as error:
        raise Refusal(400, "invalid_grammar", f"`{name}`: {error}", param=name) from error


def _grammar(answer: Answer, body: SamplingFields) -> str:
    whitespace = body.guided_whitespace_pattern
    try:
        return grammars.json_schema(answer.schema, strict=answer.is_strict, whitespace=whitespace)
    except GrammarError as error:
        raise Refusal(400, "invalid_grammar", f"`response_format`: {error}", param="response_format") from error


def _answer(asked: ResponseFormat) -> Answer | None:
    match asked.type:
        case "text":
            return None
        case "json_object":
            return Answer('{"type": "object"}', is_strict=True)
        case "json_schema":
            schema = None if asked.json_schema is None else given(asked.json_schema.schema)
            if asked.json_schema is None or schema is None:
                message = "`response_format.json_schema.schema` is missing."
                raise Refusal(400, "invalid_value", message, param="response_format")
            return Answer(_schema_text(schema, "response_format"), is_strict=bool(asked.json_schema.strict))
    message = f"`response_format.type` {asked.type[:50]!r} is not supported: text, json_object or json_schema."
    raise Refusal(400, "unsupported_parameter", message, param="response_format")


def _structured(asked: StructuredOutputs) -> str:
    whitespace = asked.whitespace_pattern
    found = []
    if (schema := given(asked.json)) is not None:
        found.append(_schema(schema, "structured_outputs", strict=True, whitespace=whitespace))
    if asked.regex is not None:
        found.append(grammars.regex(asked.regex))
    if asked.choice is not None:
        found.append(grammars.choice(asked.choice))
    if asked.grammar is not None:
        found.append(grammars.lark(asked.grammar))
    if asked.json_object:
        found.append(grammars.json_object(whitespace))
    if len(found) != 1:
        message = "`structured_outputs` takes one of json, regex, choice, grammar and json_object."
        raise Refusal(400, "invalid_value", message, param="structured_outputs")
    return found[0]


def _schema(raw: Raw, name: str, *, strict: bool, whitespace: str | None) -> str:
    return grammars.json_schema(_schema_text(raw, name), strict=strict, whitespace=whitespace)


def _schema_text(raw: Raw, name: str) -> str:
    """A schema is an object, or text that holds one."""
    return decode_raw(raw, str, name) if bytes(raw)[:1] == b'"' else bytes(raw).decode()
