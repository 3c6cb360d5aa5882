"""Tiny checkpoints made by transformers, and our decoder's logits for them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from evenhand_engine.config import SchedulerSettings
from evenhand_engine.core.staging import Staging
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.decoder import build_decoder, forward
from evenhand_engine.model.precision import Precision
from evenhand_engine.model.weights import load_weights
from evenhand_engine.scheduler.batch import BatchPlan
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_kernels.kernels import Kernels, KvCacheShape

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def make_checkpoint(
    directory: Path, config_class: type[PreTrainedConfig], **fields: Any
) -> tuple[Path, PreTrainedModel]:
    """A random model of a config class, saved; its directory and the reference itself, float32 and eager."""
    torch.manual_seed(7)
    config = config_class(**(SHAPE | fields))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for name, parameter in model.named_parameters():  # norms and biases too, or nothing would test them
        scale = 0.3 if parameter.dim() > 1 else 0.5
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=scale)
    model.save_pretrained(directory)
    return directory, model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """`make_checkpoint` into a directory of the test's own."""
    return functools.partial(make_checkpoint, tmp_path)


def _split(total: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, min(size, total - start)
        start += size
    assert start >= total


@pytest.fixture
def our_logits() -> Callable[..., Tensor]:
    """Logits of every token of one sequence, float32 [num_tokens, vocab_size], computed in chunks of these sizes."""

    def compute(model_dir: Path, token_ids: Sequence[int], chunks: Sequence[int], kernels: Kernels) -> Tensor:
        config = load_model_config(model_dir)
        settings = SchedulerSettings(max_num_batched_tokens=256, max_num_seqs=4, max_model_len=256, num_kv_blocks=40)
        weights = load_weights(model_dir, config, Precision(), kernels)
        cache = KvCacheShape(settings.num_kv_blocks, settings.block_size, torch.float32)
        decoder = build_decoder(config, weights, kernels, cache, settings.max_model_len)
        request = Request("a", "tenant", list(token_ids), SamplingParams(max_tokens=1), arrival_time=0.0)
        request.block_table = list(range(39, 39 - 2 * 16, -2))  # neither in order nor next to each other
        request.seat = 2
        staging, logits = Staging(settings, kernels), []
        for step_id, (_, size) in enumerate(_split(len(token_ids), chunks)):
            plan = BatchPlan()
            plan.add_chunk(request, size)
            model_input = staging.fill(plan.build(step_id, ()))
            everything = dataclasses.replace(model_input, logits_indices=torch.arange(size, dtype=torch.int32))
            with torch.inference_mode():
                logits.append(forward(decoder, everything))
        return torch.cat(logits)

    return compute
