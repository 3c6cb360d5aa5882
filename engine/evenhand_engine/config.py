"""EngineConfig: settings of the engine core, read once at start and frozen."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class SchedulingPolicy(StrEnum):
    """FAIR shares by tenant; FCFS and STATIC are the baselines that every report compares with."""

    FAIR = "fair"
    FCFS = "fcfs"
    STATIC = "static"  # a batch runs to its end before the next one starts


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Limits of the scheduler that come with the engine, not with a policy.

    Attributes:
        scheduling_policy: who goes first.
        max_num_seqs: most requests running at once.
        max_num_batched_tokens: most tokens in one step.
        max_model_len: most tokens of one request, prompt and output together.
        num_kv_blocks: size of the KV cache.
        block_size: tokens in one KV block.
        enable_prefix_caching: keep and reuse the KV blocks of equal prompt prefixes.
        preemption_lag: cost by which a tenant's virtual service (at weight 1) must be behind before a running request
            of an over-served tenant is preempted for it: some seconds of one stream (theta in docs/fairness.md).
        min_run_seconds: a request that runs for less is not preempted for service.
        max_preemptions: a request that was preempted so often is not preempted for service again.
        max_bypasses: requests admitted past a large one that lacks memory, before memory is held for it.
        growth_blocks: blocks that an admission leaves free for each running request, to grow into until one finishes.
        min_prefill_tokens: tokens of a step that prompts may use, whatever an inter-token objective allows.
        max_refunded_tokens: outputs past a stop string that are given back to a request's tenant: what can be computed
            while one message goes to the HTTP process and back.
        num_speculative_tokens: most tokens of a stream that a step guesses beside the next one; 0: none. Else a step's
            results must be known before the next is planned (`Runner.pipeline_depth` 1).
        target_step_seconds: no prompt makes a step longer than this while anybody runs whose policy sets no inter-token
            objective; None: any length.
        target_step_cost: the part of the rate at which prompts are computed, in steps of as many tokens as they may have, that
            `target_step_seconds` may cost, the prompts' context left out; where it would be more, steps are longer. 1: any.
        objective_hold_seconds: how long an inter-token objective goes on to bound steps after the tenant's last stream
            ended, so that the next turn of a conversation does not meet a long step.
    """

    scheduling_policy: SchedulingPolicy = SchedulingPolicy.FAIR
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    num_kv_blocks: int = 1024
    block_size: int = 16
    enable_prefix_caching: bool = True
    preemption_lag: int = 1536
    min_run_seconds: float = 1.0
    max_preemptions: int = 3
    max_bypasses: int = 4
    growth_blocks: float = 1.5
    min_prefill_tokens: int = 16
    max_refunded_tokens: int = 8
    num_speculative_tokens: int = 0
    target_step_seconds: float | None = None
    target_step_cost: float = 1.0
    objective_hold_seconds: float = 1.0

    @property
    def max_num_outputs(self) -> int:
        """Most output tokens of one step."""
        with_drafts = self.max_num_seqs * (1 + self.num_speculative_tokens)
        return max(self.max_num_seqs, min(self.max_num_batched_tokens, with_drafts))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine core process is started with. None means: chosen by the engine for the model and the device.

    Attributes:
        model: Hugging Face directory, hub id or GGUF file; None: the default model.
        device: "cpu", "cuda", "auto" (cuda where there is one), or for tests "emulated": the GPU engine on the CPU.
        kernels: "auto" (the device's own), or "reference": plain torch, several times slower, to compare with.
        tensor_parallel_size: GPUs of this machine that share each layer of the model.
        gpu_memory_utilization: part of the device's memory that the engine may take; the KV cache gets what is left of it.
        load_format: "auto", or "dummy" for random weights of the model's config.
        dtype: of the weights: "auto" (as the checkpoint stores them, quantised ones included), "float32", "bfloat16" or
            "float16".
        kv_cache_dtype: "auto" (that of the weights, float16 where they are quantised), one of these three, or on a GPU "fp8":
            e4m3, with the scales that the checkpoint names for each layer, or 1.
        activation_dtype: to which what enters a linear layer is rounded, on the CPU: "float32", "bfloat16", which
            multiplies twice as fast on processors that have it, "int16" and "int8", which do with weights in codes, or "auto":
            beside weights of float32 or float16 float32, else bfloat16 on processors that are fast with it, or beside
            codes int16.
        quantization: "none", or "int8" for weights that the checkpoint does not hold quantised.
        max_model_len: None: the model's own.
        max_num_seqs: None: 32 on the CPU, 256 on a GPU.
        max_num_batched_tokens: None: on the CPU the least by which prompts are computed as fast as by 256, measured at
            start; 2048 on a GPU.
        target_step_ms: milliseconds that prompts may make a step take where no policy sets an objective, 0: any; None: on
            the CPU 200, or more where that would cost more than 2 % of the rate of prompts; 0 on a GPU.
        kv_cache_bytes: memory for the KV cache; None: 1 GiB on the CPU, what is left on a GPU.
        speculative: "none", or "ngram": guess a stream's next tokens from what followed the same ones before.
        num_speculative_tokens: most guesses of a stream in one step.
        seed: of dummy weights.
        record_steps: CSV file to write every step's shape and duration to, for fits and replays.
        replay_steps: such a file, whose steps' token counts are the token budgets of this run's steps, over and over.
    """

    model: str | None = None
    device: str = "auto"
    kernels: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    load_format: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    activation_dtype: str = "auto"
    quantization: str = "none"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    target_step_ms: float | None = None
    kv_cache_bytes: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = SchedulingPolicy.FAIR
    speculative: str = "none"
    num_speculative_tokens: int = 8
    seed: int = 0
    record_steps: Path | None = None
    replay_steps: Path | None = None
