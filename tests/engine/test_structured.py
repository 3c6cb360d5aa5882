"""Grammars: what is allowed is what the schema says, whoever samples; hostile ones cost little; tenants share nothing."""

import json
import queue
import random
import threading
from array import array
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher
from msgspec import Meta
from tokenizers import pre_tokenizers

from evenhand_engine.config import EngineConfig, SchedulerSettings
from evenhand_engine.core import engine
from evenhand_engine.core.compile_queue import Compiled, CompileQueue
from evenhand_engine.core.loading import LoadedModel
from evenhand_engine.core.structures import StructuredStep, Structures, forbidden
from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.batch import Batch, ScheduledRequest, StartedRequest
from evenhand_engine.scheduler.request import FinishReason, Sampled, SamplingParams
from evenhand_engine.structured import compiler as compiler_module
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.structured.grammars import GrammarError
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import EOS, VOCAB_SIZE

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


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(lambda: tokenizer)


def started(seat: int, outputs: tuple[int, ...] = (), request_id: str = "r") -> StartedRequest:
    return StartedRequest(seat, request_id, array("I", (1, 2, *outputs)), 2, SamplingParams(max_tokens=99))


def allowed(structures: Structures, batch: Batch, *sampled: tuple[int, ...]) -> dict[int, set[int]]:
    """Tokens that may come, by row; then these come."""
    step = structures.begin(batch)
    if step is None:
        return {}
    found = allowed_in(step)
    step.advance([Sampled(token_ids) for token_ids in sampled] or [Sampled(())] * len(batch.scheduled))
    return found


def allowed_in(step: StructuredStep) -> dict[int, set[int]]:
    return {row: set(np.flatnonzero(~forbidden(mask, VOCAB_SIZE)).tolist()) for row, mask in step.masks().items()}


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
    assert matcher.try_consume_tokens(_bytes(b"{" + newline)) == 3
    matcher = compiler.compile("t", grammars.json_object()).deep_copy()
    assert matcher.try_consume_tokens(_bytes(b"{" + space)) == 22


def _bytes(text: bytes) -> list[int]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = {byte: letters.index(letter) for letter, byte in _letters().items()}
    return [shown[byte] for byte in text]


def _letters() -> dict[str, int]:
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


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


def test_a_grammar_that_becomes_too_complex_leaves_no_token(compiler: Compiler) -> None:
    """So the request ends with an error, and no other does."""
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.regex(r"((\w|\s)*\w(\d|\w|.){30}){1,50}")))
    tokens = tuple(_bytes(b"ab cd 12 " * 40))
    for end in range(len(tokens)):
        batch = Batch(1, (ScheduledRequest(0, 1 + end, 1, 1),), 1, (started(0, tokens[:end]),))
        step = structures.begin(batch)
        assert step is not None
        may_come, results = allowed_in(step)[0], [Sampled(())]
        step.advance(results)
        assert results[0].failure is (FinishReason.ERROR if may_come else FinishReason.GRAMMAR)
        if not may_come:
            return
    raise AssertionError("it never became too complex")


def test_a_preempted_request_goes_on_where_it_was(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["abc", "axy"])))
    a, b, c, x, y = _bytes(b"abcxy")
    first = Batch(1, (ScheduledRequest(0, 0, 2, 1),), started=(started(0),))
    assert allowed(structures, first, (a,)) == {0: {a}}
    assert allowed(structures, Batch(2, (ScheduledRequest(0, 2, 1, 1),), 1)) == {0: {b, x}}
    again = Batch(3, (ScheduledRequest(5, 0, 4, 1),), started=(started(5, (a, x)),), freed_seats=(0,))
    assert allowed(structures, again, (y,)) == {0: {y}}
    assert allowed(structures, Batch(4, (ScheduledRequest(5, 4, 1, 1),), 1)) == {0: {EOS}}
    assert c not in {y}


def test_rows_of_others_and_chunks_have_no_mask(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab"])))
    (a,) = _bytes(b"a")
    free = StartedRequest(1, "free", array("I", (1, 2, 3)), 3, SamplingParams(max_tokens=9))
    chunk = Batch(1, (ScheduledRequest(1, 0, 3, 1), ScheduledRequest(0, 0, 1, 0)), started=(free, started(0)))
    assert allowed(structures, chunk, (7,)) == {}
    both = Batch(2, (ScheduledRequest(1, 3, 1, 1), ScheduledRequest(0, 1, 1, 1)), 1)
    assert allowed(structures, both) == {1: {a}}
    beside_a_chunk = Batch(3, (ScheduledRequest(1, 0, 2, 0), ScheduledRequest(0, 1, 1, 1)), started=(free,))
    assert allowed(structures, beside_a_chunk) == {0: {a}}, "a chunk has no row"
    structures.forget("r")
    taken = Batch(3, (ScheduledRequest(0, 0, 3, 1),), started=(started(0, request_id="other"),))
    assert allowed(structures, taken) == {}


def test_drafts_are_masked_as_if_they_were_right(compiler: Compiler) -> None:
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["abcd", "axyz"])))
    a, b, c, d, x, y = _bytes(b"abcdxy")
    drafted = ScheduledRequest(0, 1, 4, 4, draft_token_ids=(a, x, c))
    batch = Batch(1, (drafted,), 1, (started(0),))
    assert allowed(structures, batch, (a, b)) == {0: {a}, 1: {b, x}, 2: {y}}, "c is no x's follower"
    assert allowed(structures, Batch(2, (ScheduledRequest(0, 3, 1, 1),), 1)) == {0: {c}}
    assert d not in {c}


def test_who_plans_ahead_is_masked_by_what_came_meanwhile(compiler: Compiler) -> None:
    """A step is begun before the last has advanced, whose request may have left its seat to another; or has ended."""
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.choice(["ab"])))
    structures.add("s", compiler.compile("t", grammars.choice(["xy"])))
    a, b, x, y = _bytes(b"abxy")
    first = structures.begin(Batch(1, (ScheduledRequest(0, 1, 1, 1),), 1, (started(0),)))
    second = structures.begin(Batch(2, (ScheduledRequest(0, 2, 1, 1),), 1))
    other = structures.begin(Batch(3, (ScheduledRequest(0, 1, 1, 1),), 1, (started(0, request_id="s"),), (0,)))
    assert first is not None and second is not None and other is not None
    first.advance([Sampled((a,))])
    assert allowed_in(second) == {0: {b}}
    assert allowed_in(other) == {0: {x}}
    second.advance([Sampled((b,))])
    other.advance([Sampled((x,))])
    last = structures.begin(Batch(4, (ScheduledRequest(0, 2, 1, 1),), 1))
    beyond = structures.begin(Batch(5, (ScheduledRequest(0, 3, 1, 1),), 1))
    assert last is not None and beyond is not None and allowed_in(last) == {0: {y}}
    last.advance([Sampled((y, EOS))])
    assert allowed_in(beyond) == {}, "its grammar has ended"


def test_after_the_end_all_may_come(compiler: Compiler) -> None:
    """With `ignore_eos` a request goes on."""
    structures = Structures(VOCAB_SIZE)
    structures.add("r", compiler.compile("t", grammars.regex("a+")))
    (a,) = _bytes(b"a")
    batch = Batch(1, (ScheduledRequest(0, 1, 1, 1),), 1, (started(0),))
    assert allowed(structures, batch, (a,)) == {0: {a}}
    later = Batch(2, (ScheduledRequest(0, 2, 1, 1),), 1)
    assert allowed(structures, later, (EOS,)) == {0: {a, EOS}}
    assert allowed(structures, Batch(3, (ScheduledRequest(0, 3, 1, 1),), 1)) == {}


def test_compiled_grammars_are_kept_by_tenant_within_bounds(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "MAX_GRAMMARS", 2)
    monkeypatch.setattr(compiler_module, "MAX_TENANTS", 2)
    a, b, c = (grammars.choice([text]) for text in "abc")
    first = compiler.compile("t", a)
    assert compiler.compile("t", a) is first
    other = compiler.compile("u", a)
    assert other is not first
    compiler.compile("t", b)
    compiler.compile("t", a)
    compiler.compile("t", c)
    assert compiler.compile("t", a) is first, "used last, so b went"
    compiler.compile("v", a)
    assert compiler.compile("t", a) is first
    assert compiler.compile("u", a) is not other, "the tenant that was away the longest went"


def until_read() -> None:
    for thread in threading.enumerate():
        if thread.name == "vocabulary":
            thread.join(20)


def test_the_vocabulary_is_read_once_and_beforehand(tokenizer: Tokenizer) -> None:
    asked = list[str]()

    def load() -> Tokenizer:
        asked.append("once")
        return tokenizer

    compiler = Compiler(load)
    compiler.prepare_aside()
    until_read()
    assert asked == ["once"]
    compiler.compile("t", grammars.choice(["x"]))
    compiler.prepare_aside()
    until_read()
    assert asked == ["once"]


def test_a_vocabulary_that_cannot_be_read_is_said_when_it_is_needed(tokenizer: Tokenizer) -> None:
    class Strange(Tokenizer):
        def __init__(self) -> None:
            self.vocab_size, self.eos_token_ids = 9, frozenset({1})

        def to_json(self) -> str:
            return '{"model": "of another kind"}'

    compiler = Compiler(Strange)
    compiler.prepare_aside()
    until_read()
    with pytest.raises(GrammarError, match="vocabulary cannot be used"):
        compiler.compile("t", grammars.choice(["x"]))


def test_the_core_reads_it_as_soon_as_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = threading.Event()

    class Core:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def run(self) -> None:
            assert prepared.wait(20)

    loaded = LoadedModel(None, SchedulerSettings(), "tiny", "float32", "cpu", tmp_path, Structures(VOCAB_SIZE))  # type: ignore[arg-type]
    monkeypatch.setattr(Compiler, "prepare_aside", lambda compiler: prepared.set())
    monkeypatch.setattr("evenhand_engine.core.loading.load_model", lambda config, lost: loaded)
    monkeypatch.setattr(engine, "EngineCore", Core)
    monkeypatch.setattr(engine.signal, "signal", lambda *_: None)
    for name in ("collect", "freeze", "disable"):
        monkeypatch.setattr(engine.gc, name, lambda: None)
    ours, theirs = Pipe()
    engine.run_core(EngineConfig(model=str(tmp_path)), theirs)
    assert prepared.is_set()
    ours.close()


def request(request_id: str, tenant_id: str, grammar: str) -> AddRequest:
    params = SamplingParams(max_tokens=9, grammar=grammar)
    return AddRequest(
        request_id=request_id, tenant_id=tenant_id, prompt_token_ids=b"", sampling_params=params, arrival_time=0.0
    )


def test_tenants_take_turns_at_compiling(tokenizer: Tokenizer) -> None:
    """Whoever sends many waits for its own alone."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    is_busy, may_go_on = threading.Event(), threading.Event()

    def load() -> Tokenizer:
        is_busy.set()
        assert may_go_on.wait(20)
        return tokenizer

    compiling = CompileQueue(Compiler(load), done.put)
    compiling.submit(request("a0", "a", grammars.choice(["0"])))
    assert is_busy.wait(20), "with the first, while the others come"
    for number in range(1, 4):
        compiling.submit(request(f"a{number}", "a", grammars.choice([str(number)])))
    compiling.submit(request("b0", "b", grammars.choice(["x"])))
    compiling.submit(request("bad", "c", grammars.regex("((")))
    may_go_on.set()
    found: list[Compiled] = [done.get(timeout=20) for _ in range(6)]
    assert [compiled.command.request_id for compiled in found] == ["a0", "a1", "b0", "bad", "a2", "a3"]
    assert [compiled.matcher is None for compiled in found] == [False, False, False, True, False, False]


def test_a_request_that_left_while_it_was_compiled_is_taken_once(compiler: Compiler) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    compiling = CompileQueue(compiler, done.put)
    compiling.submit(request("a", "t", grammars.choice(["x"])))
    assert not compiling.take("b")
    assert compiling.take("a"), "its client left"
    done.get(timeout=20)
    assert not compiling.take("a")


def test_a_fault_of_the_thread_is_told(compiler: Compiler) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def fail() -> Tokenizer:
        raise RuntimeError("no tokenizer")

    CompileQueue(Compiler(fail), done.put).submit(request("a", "t", grammars.choice(["x"])))
    assert isinstance(done.get(timeout=20), RuntimeError)
