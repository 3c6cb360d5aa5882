"""Compiling: what is kept, in whose turn, when the vocabulary is read, and what goes wrong."""

import functools
import queue
import threading
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from evenhand_engine.config import EngineConfig, SchedulerSettings
from evenhand_engine.core import engine
from evenhand_engine.core.compile_queue import Compiled, CompileQueue
from evenhand_engine.core.loading import LoadedModel
from evenhand_engine.core.structures import Structures
from evenhand_engine.messages import AddRequest
from evenhand_engine.scheduler.request import SamplingParams
from evenhand_engine.structured import compiler as compiler_module
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.structured.grammars import GrammarError
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import VOCAB_SIZE


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


def steps_of_a_start(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a core does until it serves, and what it does to the collector of garbage, in order."""
    steps = list[str]()

    class Core:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def run(self) -> None:
            steps.append("serve")

    def load(*_: object) -> LoadedModel:
        steps.append("load")
        return LoadedModel(None, SchedulerSettings(), "tiny", "float32", "cpu", directory, Structures(VOCAB_SIZE))  # type: ignore[arg-type]

    monkeypatch.setattr(Compiler, "prepare_aside", lambda compiler: steps.append("prepare"))
    monkeypatch.setattr("evenhand_engine.core.loading.load_model", load)
    monkeypatch.setattr(engine, "EngineCore", Core)
    monkeypatch.setattr(engine.signal, "signal", lambda *_: None)
    for name in ("collect", "freeze", "disable"):
        monkeypatch.setattr(engine.gc, name, functools.partial(steps.append, name))
    ours, theirs = Pipe()
    engine.run_core(EngineConfig(model=str(directory)), theirs)
    ours.close()
    return steps


def test_the_core_reads_it_as_soon_as_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_of_a_start(tmp_path, monkeypatch)[-2:] == ["prepare", "serve"]


def test_the_core_looks_for_garbage_once_and_not_among_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of_a_start(tmp_path, monkeypatch)
    assert steps[:-2] == ["disable", "freeze", "load", "collect", "freeze"]


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
        assert may_go_on.wait(120)
        return tokenizer

    compiling = CompileQueue(Compiler(load), done.put)
    compiling.submit(request("a0", "a", grammars.choice(["0"])))
    assert is_busy.wait(120), "with the first, while the others come"
    for number in range(1, 4):
        compiling.submit(request(f"a{number}", "a", grammars.choice([str(number)])))
    compiling.submit(request("b0", "b", grammars.choice(["x"])))
    compiling.submit(request("bad", "c", grammars.regex("((")))
    may_go_on.set()
    found: list[Compiled] = [done.get(timeout=120) for _ in range(6)]
    assert [compiled.command.request_id for compiled in found] == ["a0", "a1", "b0", "bad", "a2", "a3"]
    assert [compiled.matcher is None for compiled in found] == [False, False, False, True, False, False]


def test_a_request_that_left_while_it_was_compiled_is_taken_once(compiler: Compiler) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    compiling = CompileQueue(compiler, done.put)
    compiling.submit(request("a", "t", grammars.choice(["x"])))
    assert not compiling.take("b")
    assert compiling.take("a"), "its client left"
    done.get(timeout=120)
    assert not compiling.take("a")


def test_a_fault_of_the_thread_is_told(compiler: Compiler) -> None:
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def fail() -> Tokenizer:
        raise RuntimeError("no tokenizer")

    CompileQueue(Compiler(fail), done.put).submit(request("a", "t", grammars.choice(["x"])))
    assert isinstance(done.get(timeout=120), RuntimeError)
