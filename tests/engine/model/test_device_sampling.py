"""Sampling on the device: seeds, adjustments, log probabilities, logits that are not finite."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from evenhand_engine.scheduler.batch import Runner
from evenhand_engine.scheduler.request import FinishReason

from .conftest import make_checkpoint
from .device_engine import (
    NUM_OUTPUTS,
    POISON,
    PROMPTS,
    SETTINGS,
    Engine,
    Model,
    make_model,
    outputs,
    served,
    served_alone,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    return served_alone(model)


@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"top_k": 9}, {"temperature": 1.3, "top_p": 0.9}])
def test_a_seed_gives_the_token_that_it_gives_on_the_cpu(model: Model, params: dict[str, Any]) -> None:
    """But where the number drawn falls between the borders of the two roundings, which is rare."""

    def drawn(runner: Runner) -> list[list[int]]:
        params_of = {"temperature": 1.0, "max_tokens": 1} | params
        return [output for seed in range(8) for output in served(runner, SETTINGS, PROMPTS, seed=seed, **params_of)]

    on_cpu, on_device = drawn(model.on_cpu), drawn(model.on_device)
    assert sum(ours == theirs for ours, theirs in zip(on_device, on_cpu, strict=True)) >= 37
    assert len({token for (token,) in on_cpu}) > 15, "draws that are no draws agree by themselves"


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.6, "frequency_penalty": 0.9, "presence_penalty": 2.0},
        {"allowed_token_ids": frozenset(range(20, 70))},
        {"logit_bias": ((9, 8.0), (150, 7.5), (70, -3.0))},
        {
            "min_p": 0.4,
            "temperature": 1.5,
            "seed": 11,
        },  # no likelihood within 2 % of min_p, no draw within 1 % of a border
    ],
    ids=str,
)
def test_what_changes_the_logits_does_so_as_on_the_cpu(
    model: Model, alone: list[list[int]], params: dict[str, Any]
) -> None:
    """Beside requests whose logits stay as they are, and with preemptions, after which all is made anew."""
    settings = replace(SETTINGS, num_kv_blocks=6, enable_prefix_caching=False)
    found = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, settings)
        adjusted = [
            engine.add(f"a{number}", prompt, **({"max_tokens": 9} | params))
            for number, prompt in enumerate(PROMPTS[1:4])
        ]
        plain = engine.add("plain", PROMPTS[2])
        engine.run()
        assert outputs(plain) == alone[2]
        assert engine.scheduler.num_preemptions > 0
        found.append([outputs(request) for request in adjusted])
    assert found[0] == found[1]
    assert [tokens[:NUM_OUTPUTS] for tokens in found[1]] != alone[1:4], "nothing was changed"


def test_bad_words_do_not_come_though_the_host_knows_their_beginning_late(model: Model, alone: list[list[int]]) -> None:
    """Of one token, of two, of three, with a common end, and beside a bias of that end."""
    first, second, third, fourth, *_ = alone[1]
    words = ((alone[2][1],), (second, third), (first, second, fourth), (fourth, third), (7, third))
    found = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        requests = [
            engine.add(f"r{number}", prompt, bad_words_token_ids=words, logit_bias=((third, 0.25),), max_tokens=9)
            for number, prompt in enumerate(PROMPTS[:3])
        ]
        engine.run()
        found.append([outputs(request) for request in requests])
    assert found[0] == found[1]
    assert found[1][1][:2] == [first, second] and found[1][1][2] != third
    assert alone[2][1] not in found[1][2]


def test_no_stop_token_comes_before_min_tokens(model: Model, alone: list[list[int]]) -> None:
    params = {"stop_token_ids": frozenset(alone[1][:3]), "min_tokens": 4, "max_tokens": NUM_OUTPUTS}
    runs = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        request = engine.add("r", PROMPTS[1], **params)
        others = engine.add("s", PROMPTS[2])
        engine.run()
        assert outputs(others) == alone[2]
        runs.append(outputs(request))
    assert runs[0] == runs[1]
    assert not set(runs[1][:4]) & set(alone[1][:3])


def test_log_probabilities_are_those_of_the_cpu(model: Model) -> None:
    told = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        engine.add("quiet", PROMPTS[0])
        engine.add("asks", PROMPTS[1], num_logprobs=3)
        engine.add("asks for its own only", PROMPTS[2], num_logprobs=0)
        engine.run()
        told.append(engine.logprobs)
    on_cpu, on_device = told
    assert "quiet" not in on_device
    for name, expected in on_cpu.items():
        assert len(on_device[name]) == NUM_OUTPUTS
        for ours, theirs in zip(on_device[name], expected, strict=True):
            assert (ours.rank, ours.top_token_ids) == (theirs.rank, theirs.top_token_ids)
            assert ours.logprob == pytest.approx(theirs.logprob, abs=0.05)
            assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=0.05)


@pytest.mark.parametrize("scales", [{}, {"k_scale": 1 / 8, "v_scale": 1 / 4}])
def test_an_fp8_cache_gives_nearly_the_same_distributions(tmp_path: Path, scales: dict[str, float]) -> None:
    """Numbers of three bits of mantissa move the tokens of a random model, but not far: a forgotten scale is off by several."""
    directory, _ = make_checkpoint(tmp_path, LlamaConfig, num_hidden_layers=1)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {f"model.layers.0.self_attn.{name}": torch.tensor(scale) for name, scale in scales.items()}
    save_file(tensors, directory / "model.safetensors")
    model = Model.load(directory, kv_dtype=torch.float8_e4m3fn)
    told = []
    for runner in (model.on_cpu, model.on_device):
        engine = Engine(runner, SETTINGS)
        for number, prompt in enumerate(PROMPTS):
            engine.add(f"r{number}", prompt, num_logprobs=20)
        engine.run()
        told.append(engine.logprobs)
    differences = []
    for name, (expected, *_) in told[0].items():  # later tokens follow others
        ours = dict(zip(told[1][name][0].top_token_ids, told[1][name][0].top_logprobs, strict=True))
        likely = list(zip(expected.top_token_ids, expected.top_logprobs, strict=True))[:3]
        differences += [abs(ours[token] - logprob) for token, logprob in likely]
    assert sum(differences) / len(differences) < 0.3


def test_logits_that_are_not_finite_end_their_request_alone(model: Model, alone: list[list[int]]) -> None:
    engine = Engine(model.on_device, SETTINGS)
    poisoned, good = engine.add("poisoned", [5, POISON, 7]), engine.add("good", PROMPTS[1])
    engine.run()
    assert poisoned.finish_reason is FinishReason.ERROR and not outputs(poisoned)
    assert outputs(good) == alone[1]
