"""What a request may ask of the GPU engine beside tokens, on the emulated device: a grammar, scores of its prompt, guesses.

All as the CPU engine gives it, in batches with others that ask for nothing, with preemptions, and with drafts and without.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher
from transformers import LlamaConfig

from evenhand_engine.scheduler.request import FinishReason, Reasoning, Request, TokenLogprobs
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import make_checkpoint
from .test_device_runner import PROMPTS, SETTINGS, Engine, Model, outputs

NUM_DRAFTS = 4
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
FEW_BLOCKS = {"num_kv_blocks": 6, "enable_prefix_caching": False}
REPEATING = [[number, *range(10 + number, 14 + number)] * 5 for number in range(1, 5)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), LlamaConfig, vocab_size=tokenizer.vocab_size, **SMALL)[0]


@pytest.fixture(scope="module")
def plain(directory: Path) -> Model:
    """Two steps ahead."""
    return Model.load(directory)


@pytest.fixture(scope="module")
def guessing(directory: Path) -> Model:
    """A step at a time, with drafts."""
    return Model.load(directory, settings=replace(SETTINGS, num_speculative_tokens=NUM_DRAFTS))


@pytest.fixture(params=["plain", "guessing"])
def model(request: pytest.FixtureRequest) -> Model:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Model)
    return found


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(lambda: tokenizer)


def engines(model: Model, **changes: Any) -> list[Engine]:
    """The CPU's, which guesses nothing, and the device's, which does where the model does."""
    settings = replace(SETTINGS, **changes)
    num_drafts = NUM_DRAFTS if model.on_device.pipeline_depth == 1 else 0
    return [
        Engine(model.on_cpu, settings),
        Engine(model.on_device, replace(settings, num_speculative_tokens=num_drafts)),
    ]


def add_guided(
    model: Model, engine: Engine, name: str, prompt: list[int], matcher: LLMatcher, **params: Any
) -> Request:
    model.structures[engine.runner].add(name, matcher)
    return engine.add(name, prompt, **({"max_tokens": 30} | params))


GRAMMARS = {
    "regex": grammars.regex(r"(ab|cd){3}[0-9]{2}"),
    "choice": grammars.choice(["abracadabra", "abrasive", "xyz"]),
    "schema": grammars.json_schema(
        json.dumps({"type": "array", "items": {"enum": [1, 22]}, "maxItems": 3}), strict=True
    ),
}


@pytest.mark.parametrize("changes", [{}, FEW_BLOCKS, {"max_num_batched_tokens": 7}], ids=str)
def test_outputs_follow_grammars(
    model: Model, compiler: Compiler, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    found, stop = [], frozenset(tokenizer.eos_token_ids)
    for engine in engines(model, **changes):
        guided = [
            add_guided(model, engine, name, PROMPTS[1 + number], compiler.compile("t", grammar), stop_token_ids=stop)
            for number, (name, grammar) in enumerate(GRAMMARS.items())
        ]
        free = [engine.add(f"free{number}", prompt) for number, prompt in enumerate(PROMPTS[:2])]
        engine.run()
        found.append([outputs(request) for request in (*guided, *free)])
        assert [request.finish_reason for request in guided] == [FinishReason.STOP] * 3
    assert found[0] == found[1]
    texts = [tokenizer.decode(tokens) for tokens in found[1][:3]]
    assert texts[1] in ("abracadabra", "abrasive", "xyz")
    assert set(json.loads(texts[2])) <= {1, 22}
    assert len(texts[0]) == 8 and texts[0][6:].isdigit()
    assert engine.scheduler.num_preemptions > 0 or changes != FEW_BLOCKS


def test_a_grammar_goes_with_all_else_that_changes_logits(model: Model, compiler: Compiler) -> None:
    """Among them what the grammar leaves nothing of: that request has no token, and ends."""
    found = []
    for engine in engines(model):
        grammar = compiler.compile("t", grammars.regex("[a-h]{12}"))
        letters = [tokens_of(compiler, text) for text in ("abcdef", "xyz")]
        allowed = add_guided(
            model, engine, "a", PROMPTS[1], grammar, allowed_token_ids=frozenset(letters[0]), max_tokens=12
        )
        nothing = add_guided(model, engine, "n", PROMPTS[2], grammar, allowed_token_ids=frozenset(letters[1]))
        biased = add_guided(
            model,
            engine,
            "b",
            PROMPTS[3],
            grammar,
            logit_bias=((letters[0][2], 3.0), (letters[1][0], 50.0)),
            frequency_penalty=1.0,
            bad_words_token_ids=((letters[0][2], letters[0][2]), (letters[0][0],)),
            temperature=0.9,
            seed=5,
            max_tokens=12,
        )
        engine.run()
        assert nothing.finish_reason is FinishReason.ERROR and not outputs(nothing)
        assert set(outputs(allowed)) <= set(letters[0])
        assert letters[1][0] not in outputs(biased) and letters[0][0] not in outputs(biased)
        found.append([outputs(allowed), outputs(biased)])
    assert found[0] == found[1]


@pytest.mark.parametrize("changes", [{}, FEW_BLOCKS], ids=str)
def test_reasoning_ends_in_time_and_a_grammar_follows(
    model: Model, compiler: Compiler, tokenizer: Tokenizer, changes: dict[str, Any]
) -> None:
    """Two steps ahead too, where the host learns of a token when the next is computed."""
    found, end, stop = [], 7, frozenset(tokenizer.eos_token_ids)
    grammar = compiler.compile("t", grammars.choice(["abrasive", "xyz"]))
    for engine in engines(model, **changes):
        inside = Reasoning(begin=6, end=end, starts_inside=True, budget=5)
        seeded: dict[str, Any] = {"temperature": 2.0, "seed": 3, "allowed_token_ids": frozenset(range(256))}
        held = [
            engine.add(f"held{budget}", PROMPTS[3], **seeded, max_tokens=14, reasoning=replace_budget(inside, budget))
            for budget in (0, 1, 8)
        ]
        both = add_guided(model, engine, "both", PROMPTS[1], grammar, reasoning=inside, stop_token_ids=stop)
        engine.run()
        found.append([outputs(request) for request in (*held, both)])
        for request, budget in zip(held, (0, 1, 8), strict=True):
            assert end in outputs(request)[: budget + 1] and len(outputs(request)) == 14
        thought = outputs(both).index(end)
        assert thought <= 5 and tokenizer.decode(outputs(both)[thought + 1 :]) in ("abrasive", "xyz")
    assert found[0] == found[1]


def replace_budget(reasoning: Reasoning, budget: int) -> Reasoning:
    return msgspec.structs.replace(reasoning, budget=budget)


def tokens_of(compiler: Compiler, text: str) -> list[int]:
    """Of each letter: what a grammar of that letter alone allows."""
    vocabulary = compiler._vocabulary
    assert vocabulary is not None
    return [vocabulary.tokenize_str(letter)[0] for letter in text]


@pytest.mark.parametrize("changes", [{}, FEW_BLOCKS, {"max_num_batched_tokens": 7}], ids=str)
def test_prompts_are_scored(model: Model, changes: dict[str, Any]) -> None:
    asked = {"chunks": (PROMPTS[1], 3), "other": (PROMPTS[4], 0), "one": (PROMPTS[0], 2), "short": (PROMPTS[3], 1)}
    told = []
    for engine in engines(model, **changes):
        for name, (prompt, number) in asked.items():
            engine.add(name, prompt, num_prompt_logprobs=number, num_logprobs=1, max_tokens=8)
        engine.add("quiet", PROMPTS[2], max_tokens=8)
        engine.run()
        told.append((engine.prompt_logprobs, engine.logprobs))
    (on_cpu, outputs_on_cpu), (on_device, outputs_on_device) = told
    assert on_device.keys() == on_cpu.keys() == {"chunks", "other", "short"}, "a prompt of one token has no score"
    for name, expected in on_cpu.items():
        assert len(on_device[name]) == len(asked[name][0]) - 1
        alike(on_device[name], expected)
        assert all(len(entry.top_token_ids) == asked[name][1] for entry in on_device[name])
    assert outputs_on_device.keys() == outputs_on_cpu.keys()
    for name in outputs_on_cpu:
        alike(outputs_on_device[name], outputs_on_cpu[name])


def alike(ours: Any, theirs: Any) -> None:
    """Up to rounding, which moves the ranks of unlikely tokens."""
    entries: list[tuple[TokenLogprobs, TokenLogprobs]] = list(zip(ours, theirs, strict=True))
    for our, their in entries:
        assert our.logprob == pytest.approx(their.logprob, abs=0.06)
        assert our.rank == pytest.approx(their.rank, abs=2)
        assert our.top_logprobs == pytest.approx(their.top_logprobs, abs=0.06)


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": frozenset(range(20, 26)), "num_logprobs": 2},
        {"allowed_token_ids": frozenset(range(20, 26)), "temperature": 0.8, "seed": 3},
        {"allowed_token_ids": frozenset(range(20, 30)), "repetition_penalty": 1.1, "frequency_penalty": 0.2},
        {"allowed_token_ids": frozenset(range(20, 24)), "bad_words_token_ids": ((20, 21), (22, 23, 22), (23, 23))},
        {"allowed_token_ids": frozenset(range(20, 24)), "stop_token_ids": frozenset({21}), "min_tokens": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("changes", [{}, FEW_BLOCKS], ids=str)
def test_drafts_change_nothing(guessing: Model, changes: dict[str, Any], params: dict[str, Any]) -> None:
    """Few tokens may come, so that they repeat."""
    found, told = [], []
    for engine in engines(guessing, **changes):
        requests = [
            engine.add(f"r{number}", prompt, **({"max_tokens": 24} | params)) for number, prompt in enumerate(REPEATING)
        ]
        engine.run()
        found.append([outputs(request) for request in requests])
        told.append([entry for name in sorted(engine.logprobs) for entry in engine.logprobs[name]])
    assert found[0] == found[1]
    alike(told[1], told[0])
    speculation = engine.scheduler.speculation
    assert 0 < speculation.num_accepted_tokens < speculation.num_draft_tokens
