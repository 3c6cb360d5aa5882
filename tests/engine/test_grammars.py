"""What a grammar lets through, and which grammars are refused."""

import json
import random
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
import pytest
from llguidance import LLMatcher
from msgspec import Meta

from evenhand_engine.core.structures import Structures
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest
from evenhand_engine.scheduler.request import Sampled
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.structured.grammars import GrammarError
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import EOS, VOCAB_SIZE
from .masks import allowed_in, started, token_ids_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class Person(msgspec.Struct, forbid_unknown_fields=True):
    """The same, as an independent decoder validates it."""

    name: Annotated[str, Meta(max_length=12)]
    age: Annotated[int, Meta(ge=0, le=130)]
    tags: Annotated[list[Literal["a", "b"]], Meta(min_length=1, max_length=3)]


def write(compiled: LLMatcher, tokenizer: Tokenizer, seed: int, limit: int = 400) -> str:
    """A text of random tokens that may come, as runners ask for masks and sample."""
    structures, chance = Structures(VOCAB_SIZE), random.Random(seed)
    structures.add("r", compiled)
    outputs: list[int] = []
    for step in range(limit):
        item = ScheduledRequest(0, 1 + step, 1, 1)
        batch = Batch(step, (item,), 1, (started(0),) if step == 0 else ())
        begun = structures.begin(batch)
        assert begun is not None
        (tokens,) = allowed_in(begun).values()
        token = EOS if EOS in tokens and chance.random() < 0.3 else chance.choice(sorted(tokens))
        begun.advance([Sampled((token,))])
        outputs.append(token)
        if token == EOS:
            return tokenizer.decode(outputs)
    raise AssertionError(f"no end: {tokenizer.decode(outputs)[-200:]!r}")


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_sampled_fits_the_schema(compiler: Compiler, tokenizer: Tokenizer, seed: int) -> None:
    compiled = compiler.compile("t", grammars.json_schema(json.dumps(PERSON), strict=True))
    msgspec.json.decode(write(compiled, tokenizer, seed), type=Person)


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (
            grammars.regex(r"\d{3}-[a-c]+"),
            lambda text: text[:3].isdigit() and text[3] == "-" and set(text[4:]) <= set("abc"),
        ),
        (grammars.choice(["yes", 'no "quoted"\n', "東京"]), lambda text: text in ("yes", 'no "quoted"\n', "東京")),
        (
            grammars.lark('start: "x"+ NUMBER\nNUMBER: /[0-9]{2}/'),
            lambda text: text.strip("x").isdigit() and text[-3] == "x",
        ),
        (grammars.lark('root ::= "[" item* "]"\nitem ::= "a" | "b"'), lambda text: set(text[1:-1]) <= set("ab")),
    ],
)
def test_other_grammars(compiler: Compiler, tokenizer: Tokenizer, grammar: str, fits: Callable[[str], bool]) -> None:
    for seed in range(4):
        text = write(compiler.compile("t", grammar), tokenizer, seed)
        assert fits(text), text


def test_white_space_between_json_tokens_has_an_end(compiler: Compiler) -> None:
    """Else small models write nothing else."""
    matcher = compiler.compile("t", grammars.json_object()).deep_copy()
    newline, space = (b"\n \n", b"\n" + b" " * 25)
    assert matcher.try_consume_tokens(token_ids_of(b"{" + newline)) == 3
    matcher = compiler.compile("t", grammars.json_object()).deep_copy()
    assert matcher.try_consume_tokens(token_ids_of(b"{" + space)) == 22


def test_a_schema_is_strict_or_as_far_as_it_is_known(compiler: Compiler) -> None:
    schema = json.dumps({"type": "array", "items": {"type": "integer"}, "uniqueItems": True})
    with pytest.raises(GrammarError, match="uniqueItems"):
        compiler.compile("t", grammars.json_schema(schema, strict=True))
    compiler.compile("t", grammars.json_schema(schema, strict=False))


DEEP = '{"type":"object","properties":{"a":' * 1500 + "{}" + "}}" * 1500
HOSTILE: dict[str, Callable[[], str]] = {
    "too long": lambda: grammars.regex("a" * 70_000),
    "too deep": lambda: grammars.json_schema(DEEP, strict=True),
    "no schema": lambda: grammars.json_schema("[1]", strict=True),
    "a reference elsewhere": lambda: grammars.json_schema('{"$ref": "http://example.com/x"}', strict=True),
    "a file": lambda: grammars.json_schema('{"$ref": "file:///etc/passwd"}', strict=True),
    "no regex": lambda: grammars.regex("((a"),
    "no grammar": lambda: grammars.lark("start: nothing"),
    "no GBNF": lambda: grammars.lark("root ::= ("),
    "no options": lambda: grammars.choice([]),
    "an empty option": lambda: grammars.choice([""]),
    "too many symbols": lambda: grammars.json_schema(
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(8)]} for i in range(9)
                ]
            }
        ),
        strict=True,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused(compiler: Compiler, name: str) -> None:
    with pytest.raises(GrammarError):
        compiler.compile("t", HOSTILE[name]())
