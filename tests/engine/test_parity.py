"""The default model's greedy tokens equal those of transformers, however the scheduler cuts and mixes the work."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from evenhand_engine.config import EngineConfig
from evenhand_engine.core.loading import LoadedModel, load_model
from evenhand_engine.model.source import resolve_model_dir
from evenhand_engine.model.weights import Checkpoint
from evenhand_engine.scheduler.batch import Batch
from evenhand_engine.scheduler.request import Request, RequestOutput, SamplingParams
from evenhand_engine.scheduler.scheduler import Scheduler
from evenhand_kernels.quantized import widened
from evenhand_policy.config import SchedulerConfig

NUM_OUTPUTS = 24
PROMPTS = (
    "The",
    "The capital of France is",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5,",
    "Il était une fois une princesse qui",
    "Water boils at one hundred degrees because " * 30,
)


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    num_threads = torch.get_num_threads()
    config = EngineConfig(
        activation_dtype="float32", max_num_batched_tokens=512, kv_cache_bytes=256 << 20, max_model_len=1024
    )
    yield load_model(config)
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def exact() -> LoadedModel:
    """With keys and values in float32: nothing that depends on the rows of a step is rounded to fewer bits than sums are."""
    return load_model(
        EngineConfig(activation_dtype="float32", kv_cache_dtype="float32", kv_cache_bytes=256 << 20, max_model_len=1024)
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(resolve_model_dir(None) / "tokenizer.json"))
    return [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def reference_logits() -> Callable[[list[int]], Tensor]:
    """The reference's logits of every token of a sequence, float32, eager attention."""
    model_dir = resolve_model_dir(None)
    reference: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(model_dir), dtype=torch.float32, attn_implementation="eager"
    )
    with Checkpoint(model_dir) as checkpoint:
        for name, parameter in reference.named_parameters():
            parameter.data = widened(checkpoint.take(name, *parameter.shape))
    reference.eval()

    def compute(token_ids: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = reference(torch.tensor([token_ids])).logits[0]
        return logits

    return compute


class Generation:
    """Runs requests to their end through a real scheduler."""

    def __init__(self, model: LoadedModel, **settings: int) -> None:
        self._runner = model.runner
        self._scheduler = Scheduler(replace(model.settings, **settings), SchedulerConfig())
        self.requests: list[Request] = []
        self.outputs: list[RequestOutput] = []
        self.batches: list[Batch] = []

    def run(
        self, prompts: Sequence[list[int]], *, ahead: bool = False, params: Sequence[SamplingParams] | None = None
    ) -> list[list[int]]:
        """The outputs of the prompts, all added at once; greedy, unless `params` says how each is sampled.

        `ahead`: plan a step before the last one's tokens are known.
        """
        now = float(len(self.batches))
        params = params or [_greedy()] * len(prompts)
        first = len(self.requests)
        added = [Request(f"r{first + n}", "t", prompt, params[n], now) for n, prompt in enumerate(prompts)]
        self.requests += added
        for request in added:
            self._scheduler.add(request, now)
        batch = self._scheduler.step(now)
        while batch is not None:
            self._runner.submit(batch)
            now += 1
            planned = self._scheduler.step(now) if ahead else None
            self.outputs += self._scheduler.update(self._runner.collect(), now)
            self.batches.append(batch)
            batch = planned or self._scheduler.step(now)
        assert all(request.finish_reason is not None for request in added)
        return [list(request.token_ids[request.num_prompt_tokens :]) for request in added]


def _greedy() -> SamplingParams:
    return SamplingParams(max_tokens=NUM_OUTPUTS, temperature=0)


@pytest.fixture(scope="module")
def alone(model: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    """The outputs of each prompt computed alone, in one piece."""
    return [Generation(model, enable_prefix_caching=False).run([prompt])[0] for prompt in prompts]


def test_alone_equals_the_reference(
    prompts: list[list[int]], alone: list[list[int]], reference_logits: Callable[[list[int]], Tensor]
) -> None:
    for prompt, outputs in zip(prompts, alone, strict=True):
        assert len(outputs) == NUM_OUTPUTS
        logits = reference_logits(prompt + outputs)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == outputs
        best, second = logits.topk(2).values.T
        assert (best - second).min() > 1e-3, "a near tie would make this test a matter of luck"


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("max_num_batched_tokens", [512, 48, 7])
def test_mixed_batches_and_chunks_change_nothing(
    model: LoadedModel, prompts: list[list[int]], alone: list[list[int]], max_num_batched_tokens: int, ahead: bool
) -> None:
    generation = Generation(model, max_num_batched_tokens=max_num_batched_tokens, enable_prefix_caching=False)
    assert generation.run(prompts, ahead=ahead) == alone
    sizes = [{item.num_scheduled_tokens for item in batch.scheduled} for batch in generation.batches]
    assert any(1 in step and max(step) > 1 for step in sizes), "no step mixed decodes with a chunk"


def test_prefix_hits_change_nothing(model: LoadedModel, prompts: list[list[int]], alone: list[list[int]]) -> None:
    generation = Generation(model)
    longest = max(prompts, key=len)
    assert generation.run([longest]) == [alone[prompts.index(longest)]]
    assert generation.run(prompts) == alone
    assert max(request.num_cached_tokens for request in generation.requests) >= len(longest) - 16


@pytest.mark.parametrize("ahead", [False, True])
def test_preemption_changes_nothing(
    model: LoadedModel, prompts: list[list[int]], alone: list[list[int]], ahead: bool
) -> None:
    needed = max(len(prompt) for prompt in prompts) + NUM_OUTPUTS
    generation = Generation(model, num_kv_blocks=-(-needed // 16) + 2, max_num_batched_tokens=64, growth_blocks=0)
    assert generation.run(prompts * 2, ahead=ahead) == alone * 2
    assert sum(request.num_preemptions for request in generation.requests) > 0, "nothing was preempted"


@pytest.mark.parametrize("max_num_batched_tokens", [512, 7])
def test_log_probabilities_of_prompts_are_the_references(
    exact: LoadedModel,
    prompts: list[list[int]],
    reference_logits: Callable[[list[int]], Tensor],
    max_num_batched_tokens: int,
) -> None:
    """However they are cut, beside others, and though their prefix is in the cache."""
    generation = Generation(exact, max_num_batched_tokens=max_num_batched_tokens)
    chosen = prompts[1:4]
    generation.run(chosen)
    asks = SamplingParams(max_tokens=2, temperature=0, num_prompt_logprobs=3)
    generation.run([prompts[0], *chosen], params=[_greedy(), asks, asks, asks])
    told = {output.request_id: output.prompt_logprobs for output in generation.outputs if output.prompt_logprobs}
    requests = generation.requests[-3:]
    assert set(told) == {request.request_id for request in requests}
    for prompt, request in zip(chosen, requests, strict=True):
        assert request.num_cached_tokens == 0
        expected = reference_logits(prompt)[:-1].log_softmax(-1)
        found = told[request.request_id]
        assert len(found) == len(prompt) - 1
        own = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert [entry.logprob for entry in found] == pytest.approx(own.tolist(), abs=1e-4)
        assert [entry.top_token_ids[0] for entry in found] == expected.argmax(-1).tolist()
        ranks = ((expected > own[:, None]).sum(-1) + 1).tolist()
        assert [entry.rank for entry in found] == pytest.approx(ranks, rel=0.01), "the last ones are near ties"
        assert all(len(entry.top_token_ids) == 3 for entry in found)


def test_seeded_tokens_are_the_same_whatever_is_in_the_batch(model: LoadedModel, prompts: list[list[int]]) -> None:
    """With penalties, which look at each request's own tokens."""
    params = [
        SamplingParams(
            max_tokens=NUM_OUTPUTS,
            seed=n,
            temperature=0.8,
            top_p=0.95,
            min_p=0.02,
            repetition_penalty=1.2,
            frequency_penalty=0.3,
            presence_penalty=0.1,
            logit_bias=((n, 2.0),),
        )
        for n in range(len(prompts))
    ]
    alone = [Generation(model).run([prompt], params=[own])[0] for prompt, own in zip(prompts, params, strict=True)]
    for max_num_batched_tokens in (512, 40):
        generation = Generation(model, max_num_batched_tokens=max_num_batched_tokens)
        assert generation.run(prompts, params=params) == alone
    needed = max(len(prompt) for prompt in prompts) + NUM_OUTPUTS
    generation = Generation(model, num_kv_blocks=-(-needed // 16) + 2, growth_blocks=0)
    assert generation.run(prompts, params=params) == alone
    assert sum(request.num_preemptions for request in generation.requests) > 0, "nothing was preempted"


@pytest.mark.parametrize("changes", [{}, {"max_num_batched_tokens": 48}, {"num_kv_blocks": 24, "growth_blocks": 0}])
def test_drafts_change_nothing(
    model: LoadedModel, prompts: list[list[int]], alone: list[list[int]], changes: dict[str, int]
) -> None:
    generation = Generation(model, num_speculative_tokens=4, **changes)
    assert generation.run(prompts) == alone
    check_drafts(generation)


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"temperature": 0.0, "repetition_penalty": 1.1}])
def test_drafts_change_nothing_that_is_drawn_or_penalized(
    exact: LoadedModel, prompts: list[list[int]], changes: dict[str, float]
) -> None:
    """With keys and values in 16 bits, rounding that depends on the rows of a step may change a draw."""
    repeated = [prompt * (120 // len(prompt) + 1) for prompt in prompts[1:7]]
    params = [SamplingParams(max_tokens=NUM_OUTPUTS, seed=n, **changes) for n in range(len(repeated))]  # type: ignore[arg-type]
    without = Generation(exact).run(repeated, params=params)
    generation = Generation(exact, num_speculative_tokens=4)
    assert generation.run(repeated, params=params) == without
    check_drafts(generation)


def check_drafts(generation: Generation) -> None:
    """Some drafts were right."""
    items = [item for batch in generation.batches for item in batch.scheduled]
    num_outputs = sum(request.num_output_tokens for request in generation.requests)
    num_certain = sum(item.num_samples - len(item.draft_token_ids) for item in items)
    assert num_certain < num_outputs


def test_bfloat16_differs_only_where_it_cannot_tell(
    prompts: list[list[int]], alone: list[list[int]], reference_logits: Callable[[list[int]], Tensor]
) -> None:
    """At the first difference the reference's two best logits are nearer to each other than neighbouring bfloat16 numbers."""
    rounded = load_model(
        EngineConfig(dtype="bfloat16", activation_dtype="float32", kv_cache_bytes=64 << 20, max_model_len=1024)
    )
    differences = 0
    for prompt, exact in zip(prompts, alone, strict=True):
        outputs = Generation(rounded, enable_prefix_caching=False).run([prompt])[0]
        if outputs == exact:
            continue
        differences += 1
        first = next(index for index in range(NUM_OUTPUTS) if outputs[index] != exact[index])
        best, second = reference_logits(prompt + exact[:first])[-1].topk(2).values.tolist()
        spacing = 2.0 ** (math.floor(math.log2(best)) - 7)  # of bfloat16 numbers there
        assert best - second < spacing
    assert differences < len(prompts) / 2
