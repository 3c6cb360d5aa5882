"""A model in two parts, each in a process of its own, gives the tokens that it gives in one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import LoadedModel, load_model
from evenhand_engine.core.tensor_parallel import ParallelRunner, WorkerLost
from evenhand_engine.errors import StartupError
from evenhand_engine.model.config import load_model_config
from evenhand_engine.model.sharding import Shard, ShardedSource, sharded_config
from evenhand_engine.scheduler.request import Request, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_kernels.quantized import QuantizedTensor
from evenhand_policy.config import SchedulerConfig

from .conftest import make_checkpoint

PROMPTS = ([3, 14, 15, 92, 65, 35], [8, 97], list(range(20, 60)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """With biases everywhere: one behind inputs that are dealt out must be added once."""
    directory, _ = make_checkpoint(
        tmp_path_factory.mktemp("llama"), LlamaConfig, attention_bias=True, mlp_bias=True, intermediate_size=160
    )
    return EngineConfig(
        model=str(directory),
        device="emulated",
        dtype="float16",
        max_num_seqs=3,
        max_num_batched_tokens=24,
        kv_cache_bytes=1 << 20,
    )


@contextmanager
def loaded(config: EngineConfig) -> Iterator[LoadedModel]:
    model = load_model(config)
    try:
        yield model
    finally:
        if isinstance(model.runner, ParallelRunner):
            model.runner.close()


def served(model: LoadedModel, **params: Any) -> list[list[int]]:
    scheduler = Scheduler(model.settings, SchedulerConfig())
    requests = [
        Request(f"r{number}", "t", prompt, SamplingParams(**{"max_tokens": 6, "temperature": 0} | params), 0.0)
        for number, prompt in enumerate(PROMPTS)
    ]
    for request in requests:
        scheduler.add(request, 0.0)
    in_flight = 0
    while (batch := scheduler.step(0.0)) is not None or in_flight:
        if batch is not None:
            model.runner.submit(batch)
            in_flight += 1
        if batch is None or in_flight >= model.runner.pipeline_depth:
            scheduler.update(model.runner.collect(), 0.0)
            in_flight -= 1
    return [list(request.token_ids[request.num_prompt_tokens :]) for request in requests]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_two_parts_give_the_tokens_of_the_whole(config: EngineConfig, kernels: str) -> None:
    config = replace(config, kernels=kernels)
    with loaded(config) as whole:
        expected = served(whole)
    with loaded(replace(config, tensor_parallel_size=2)) as parts:
        assert isinstance(parts.runner, ParallelRunner)
        assert served(parts) == expected
        drawn = served(parts, temperature=1.0, seed=5)
        assert served(parts, temperature=1.0, seed=5) == drawn != expected, "the parts no longer sit alike"
        parts.runner._workers[0].process.kill()
        parts.runner._workers[0].process.wait()
        with pytest.raises(WorkerLost, match="tensor parallel rank 1 has ended with -9"):
            served(parts)


def test_what_cannot_be_dealt_out_is_refused(config: EngineConfig) -> None:
    model_config = load_model_config(Path(config.model or ""))
    with pytest.raises(StartupError, match="size 4 does not divide the model's num_heads 6"):
        sharded_config(model_config, Shard(0, 4))
    with pytest.raises(StartupError, match="tensor parallelism is for GPUs"):
        load_model(replace(config, device="cpu", dtype="auto", tensor_parallel_size=2))


def test_parts_of_a_quantised_weight_are_the_weight() -> None:
    codes = torch.arange(4 * 32, dtype=torch.uint8).view(4, 32)  # of 64 columns
    scales, minima = torch.rand(4, 2), torch.rand(4, 2)
    whole = QuantizedTensor(codes, scales, minima)

    class Source:
        def take(self, name: str, *shape: int) -> QuantizedTensor:
            assert shape == (4, 64)
            return whole

    def parts(name: str, *shape: int) -> list[torch.Tensor]:
        taken = [ShardedSource(Source(), Shard(rank, 2)).take(name, *shape) for rank in range(2)]
        return [part.dequantized() for part in taken if isinstance(part, QuantizedTensor)]

    assert torch.equal(torch.cat(parts("layers.0.self_attn.q_proj.weight", 2, 64)), whole.dequantized())
    assert torch.equal(torch.cat(parts("layers.0.mlp.down_proj.weight", 4, 32), dim=1), whole.dequantized())
    coarse = QuantizedTensor(codes, scales[:, :1], minima[:, :1])
    whole = coarse
    with pytest.raises(StartupError, match=r"down_proj\.weight: groups of 64 inputs cannot be dealt out to 2 devices"):
        parts("layers.0.mlp.down_proj.weight", 4, 32)
