"""Whether kernels and engine are right on the device. Parts: the kernels' cases, and the engine against transformers.

Every case of the kernels runs as under the emulation, against float64. The engine decodes a random model of each
architecture in float16, in mixed batches; transformers computes the same sequences in float32, and at every place the
engine's token must be the best one or as good up to rounding.
"""

import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_common import Loop, Options, options, report
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import load_model
from evenhand_kernels.checks.case import Case
from evenhand_kernels.checks.mutants import CASES
from evenhand_kernels.device import CompileError, Device

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
ARCHITECTURES: tuple[tuple[type[PreTrainedConfig], dict[str, Any]], ...] = (
    (LlamaConfig, {}),
    (LlamaConfig, {"head_dim": 128, "num_attention_heads": 3, "num_key_value_heads": 1}),
    (MistralConfig, {"sliding_window": 40}),
    (Qwen2Config, {}),
    (Qwen3Config, {}),
    (SmolLM3Config, {"pad_token_id": 0}),
)
PROMPTS: tuple[int, ...] = (1, 16, 17, 40, 130, 300)
NUM_PROCESSES = 8
TOLERANCE = 0.03
"""Of logits, as a part of their spread: what rounding to 16 bits may move."""


def check_cases(options: Options, selected: str) -> None:
    """`selected`: all; or few, one of each kernel and of each way to attend: what a sanitizer has time for."""
    numbers = [number for number, case in enumerate(CASES) if selected == "all" or case.small]
    name = "cases" if selected == "all" else "sanitized"
    if selected == "few" or options.is_tiny:
        ways = () if options.is_tiny else WAYS
        numbers = list({what: number for number in numbers for what in _covered(CASES[number], ways)}.values())
        tell(name, (outcome_of(options, number) for number in numbers))
    else:
        tell(name, outcomes_of_all(options, numbers))


WAYS = ("bulk copies", "fp8", "head size 128", "split", "wgmma", "window")


def _covered(case: Case, ways: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What a case is one of."""
    its_ways = tuple(way for way in ways if way in case.name)
    return [(kernel, *(its_ways if kernel == "attention" else ())) for kernel in case.kernels]


def tell(name: str, outcomes: Iterable["Outcome"]) -> None:
    """As they come: what is known when the time is up is kept."""
    failed: list[str] = []
    for number, outcome in enumerate(outcomes, 1):
        failed += [outcome.problem] if outcome.problem else []
        report(**{name: {"cases": number, "failed": failed}})


class Outcome(NamedTuple):
    """Of a case: what is wrong, if anything is. `has_run`: else the process has lost its device to another case."""

    problem: str | None
    has_run: bool = True


def outcomes_of_all(options: Options, numbers: list[int]) -> Iterator[Outcome]:
    """By several processes, since compilers are what takes the time. What they leave after an error that no later call of a
    process survives, such as an illegal address, new ones run; and if one dies, which takes all of them along, one process alone runs
    what is left, so that it is known which case it was."""
    num_processes = NUM_PROCESSES
    while numbers:
        left, place = [], 0
        try:
            with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as processes:
                for outcome in processes.map(outcome_of, repeat(options), numbers):
                    place += 1
                    if outcome.has_run:
                        yield outcome
                    else:
                        left.append(numbers[place - 1])
        except BrokenProcessPool:
            if num_processes == 1:
                yield Outcome(f"{CASES[numbers[place]]}: its process died")
                place += 1
            num_processes = 1
        numbers = left + numbers[place:]


def outcome_of(options: Options, number: int) -> Outcome:
    """On this process's device."""
    if _lost:
        return Outcome(f"{CASES[number]}: not run", has_run=False)
    case, device = CASES[number], _device(options)
    try:
        with device.stream():
            case.run(device)
            device.record().wait()
    except (AssertionError, CompileError) as error:
        return Outcome(f"{case}: {str(error)[:200]}")
    except Exception as error:
        _lost.append(case)
        return Outcome(f"{case}: {type(error).__name__}: {str(error)[:200]}")
    return Outcome(None)


_lost: list[Case] = []
"""Which case has cost this process its device."""


@cache
def _device(options: Options) -> Device:
    return options.make_device()


def check_parity(options: Options) -> None:
    architectures, prompts, num_outputs = ARCHITECTURES, PROMPTS, 32
    if options.is_tiny:
        architectures, prompts, num_outputs = ARCHITECTURES[:1], PROMPTS[:3], 4
    results = {}
    for config_class, fields in architectures:
        name = " ".join([config_class.__name__, *(f"{key}={value}" for key, value in fields.items())])
        results[name] = _parity(options, config_class, fields, prompts, num_outputs)
        totals = {total: sum(found[total] for found in results.values()) for total in ("tokens", "wrong")}
        report(parity={"architectures": results} | totals)


def _parity(
    options: Options,
    config_class: type[PreTrainedConfig],
    fields: dict[str, Any],
    prompts: tuple[int, ...],
    num_outputs: int,
) -> dict[str, int]:
    """`tokens` compared, `wrong` beyond rounding, `near`: not the best one, but as good."""
    torch.manual_seed(options.seed)
    reference = AutoModelForCausalLM.from_config(
        config_class(**(SHAPE | fields)), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with tempfile.TemporaryDirectory() as directory:
        for parameter_name, parameter in reference.named_parameters():
            mean = 1.0 if "norm" in parameter_name else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.2 if parameter.dim() > 1 else 0.3)
            parameter.data = parameter.data.half().float()
        reference.save_pretrained(directory)
        config = EngineConfig(
            model=str(Path(directory)),
            device=options.device,
            dtype="float16",
            max_num_seqs=8,
            max_num_batched_tokens=64,
            kv_cache_bytes=32 << 20,
            max_model_len=512,
        )
        model = load_model(config)
    loop = Loop(model, model.settings, seed=options.seed)
    for num_tokens in prompts:
        loop.add(num_tokens, num_outputs)
    requests = list(loop.scheduler.request_table.requests.values())
    loop.drain()
    found = {"tokens": 0, "wrong": 0, "near": 0}
    for request in requests:
        tokens = torch.tensor([list(request.token_ids)])
        with torch.inference_mode():
            logits = reference(tokens).logits[0, request.num_prompt_tokens - 1 : -1]
        chosen = logits.gather(1, tokens[0, request.num_prompt_tokens :, None])[:, 0]
        behind = (logits.amax(-1) - chosen) / logits.std(-1)
        found["tokens"] += len(behind)
        found["wrong"] += int((behind > TOLERANCE).sum())
        found["near"] += int(((behind > 0) & (behind <= TOLERANCE)).sum())
    return found


def main() -> None:
    chosen = options(__doc__, part=("cases", "parity"), cases=("all", "few"))
    if chosen.part == "cases":
        check_cases(chosen.options, chosen.cases)
    else:
        check_parity(chosen.options)


if __name__ == "__main__":
    main()
