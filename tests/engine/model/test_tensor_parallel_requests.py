"""What a request may ask for beside tokens, of a model in two parts: as of one in one, greedy and drawn, guessed or not.

Sums of two parts are rounded once more, so a draw that falls between two tokens may take either: the seeds here have none.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import LoadedModel
from evenhand_engine.scheduler.request import FinishReason, Reasoning
from evenhand_engine.structured import grammars
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer

from .conftest import make_checkpoint
from .device_engine import Engine, outputs
from .test_tensor_parallel import loaded

PROMPTS = ([3, 14, 15, 92, 65, 35], [8, 97], list(range(20, 60)), [5, 6, 7, 8] * 5)
KINDS: dict[str, dict[str, Any]] = {
    "one step after the other": {"kernels": "reference"},
    "two steps ahead": {},
    "drafts": {"speculative": "ngram", "num_speculative_tokens": 3},
}
THOUGHT = Reasoning(begin=6, end=7, starts_inside=True, budget=4)
GUIDED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.2, "seed": 4},
    "thinks before": {"reasoning": THOUGHT},
    "with all else": {"temperature": 0.9, "seed": 5, "frequency_penalty": 1.0, "logit_bias": ((70, 4.0),)},
}
FREE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "thinks": {"reasoning": THOUGHT},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    "drawn with penalties": {"temperature": 0.8, "seed": 4, "presence_penalty": 2.0, "repetition_penalty": 1.1},
    "words": {"logit_bias": ((9, 6.0), (11, 6.0)), "bad_words_token_ids": ((9, 11), (11, 9))},
    "not yet": {"min_tokens": 9, "stop_token_ids": frozenset(range(100)), "allowed_token_ids": frozenset(range(120))},
    "told": {"num_logprobs": 3, "num_prompt_logprobs": 2},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}
    sizes = {"vocab_size": tokenizer.vocab_size, "intermediate_size": 64, "num_hidden_layers": 1}
    return make_checkpoint(tmp_path_factory.mktemp("llama"), LlamaConfig, **heads, **sizes)[0]


@pytest.fixture(scope="module", params=list(KINDS))
def models(request: pytest.FixtureRequest, directory: Path) -> Iterator[list[LoadedModel]]:
    """In one part, then in two."""
    config = EngineConfig(
        model=str(directory),
        device="emulated",
        dtype="float16",
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=96,
        kv_cache_bytes=1 << 16,
        **KINDS[request.param],
    )
    halves = replace(
        config, tensor_parallel_size=2, kv_cache_bytes=1 << 15
    )  # as many blocks, so that batches are the same
    with loaded(config) as whole, loaded(halves) as parts:
        yield [whole, parts]


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(lambda: tokenizer)


def test_two_parts_do_what_one_does(models: list[LoadedModel], compiler: Compiler, tokenizer: Tokenizer) -> None:
    grammar = grammars.regex(r"[a-f]{2}(xy|yx){3}[0-9]{2}")
    stop = frozenset(tokenizer.eos_token_ids)
    found: list[dict[tuple[str, str], Any]] = []
    for model in models:
        assert model.structures is not None
        engine = Engine(model.runner, model.settings)
        requests = {}
        for number, (name, params) in enumerate(GUIDED.items()):
            model.structures.add(f"guided {name}", compiler.compile("t", grammar))
            params = {"grammar": grammar, "max_tokens": 20, "stop_token_ids": stop} | params
            requests[name, "guided"] = engine.add(f"guided {name}", PROMPTS[number % len(PROMPTS)], **params)
        for number, (name, params) in enumerate(FREE.items()):
            requests[name, "free"] = engine.add(name, PROMPTS[number % len(PROMPTS)], **({"max_tokens": 14} | params))
        engine.run()
        for name in GUIDED:
            model.structures.forget(f"guided {name}")
            assert requests[name, "guided"].finish_reason is FinishReason.STOP
        told = engine.logprobs["told"], engine.prompt_logprobs["told"]
        assert len(told[0]) == 14 and len(told[1]) == len(PROMPTS[3]) - 1
        likeliest = [entry.top_token_ids for entries in told for entry in entries]
        found.append(
            {name: outputs(request) for name, request in requests.items()} | {("told", "likeliest"): likeliest}
        )
    whole, parts = found
    assert {name: tokens for name, tokens in parts.items() if tokens != whole[name]} == {}


def test_who_leaves_in_flight_takes_no_mask_along(models: list[LoadedModel], compiler: Compiler) -> None:
    """Its seat is another's in the next step, whose outputs follow another grammar, or none."""
    letters = grammars.regex("[a-f]{40}")
    found = []
    for model in models:
        assert model.structures is not None
        engine = Engine(model.runner, model.settings)
        kept = []
        for turn in range(3):
            name = f"leaves {turn}"
            model.structures.add(name, compiler.compile("t", letters))
            leaves = engine.add(name, PROMPTS[1], grammar=letters, max_tokens=40, temperature=1.0, seed=turn)
            kept.append(engine.add(f"stays {turn}", PROMPTS[turn]))
            for _ in range(4):
                engine.step()
            engine.scheduler.abort(leaves.request_id, FinishReason.ABORT)
            model.structures.forget(name)
        engine.run()
        found.append([outputs(request) for request in kept])
    assert found[0] == found[1]
