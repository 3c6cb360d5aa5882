"""Messages between the HTTP side and the engine core process: msgspec structs, sent as MessagePack.

Times are `time.monotonic()` seconds, which on Linux and macOS is one clock for all processes of a machine.
"""

import msgspec

from evenhand_engine.scheduler.request import FinishReason, RequestOutput, SamplingParams
from evenhand_policy.config import SchedulerConfig


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request that passed the door. `user` orders requests inside a tenant whose fairness is PerUser, `priority` where
    it is Priority.

    `prompt_token_ids`: unsigned 32-bit integers in this machine's byte order, four bytes each.
    """

    request_id: str
    tenant_id: str
    prompt_token_ids: bytes
    sampling_params: SamplingParams
    arrival_time: float
    user: str = ""
    priority: int = 0


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a request: the client is gone (ABORT), or a stop string was seen in its text (STOP).

    `num_output_tokens`: how many outputs count; those computed past a stop string are discarded and not charged.
    """

    request_id: str
    reason: FinishReason
    num_output_tokens: int | None = None


class Reconfigure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Enforce this config from the next step on; `num_replicas` engines share the pool's totals."""

    config: SchedulerConfig
    num_replicas: int = 1


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Leave the loop and exit; from an API server: it is about to exit itself."""


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded and warm. Sent once to each connection, first."""

    model_name: str
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    dtype: str
    device: str
    knows_grammars: bool = False
    scores_prompts: bool = False


class StartupProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the core does before it is ready, and how far it has come: for people."""

    stage: str


class StartupFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The core could not start; `message` is what the user should read. Sent instead of EngineReady."""

    message: str


class TenantStats(msgspec.Struct, frozen=True, kw_only=True):
    """Live state of one tenant in the scheduler. Services are integers in units of price; virtual = service / weight.

    `ahead` is how far the tenant's virtual service is beyond the virtual time; it is never behind it. `lag` is how far it
    is behind the tenant that is furthest ahead, 0 for one that waits for nobody; `lag_bound` is the most that it may be
    now (docs/fairness.md).
    """

    tenant_id: str
    num_running: int
    num_waiting: int
    num_kv_blocks: int
    service: int
    virtual_service: float
    ahead: float
    lag: float
    lag_bound: float
    num_preemptions: int
    num_prompt_tokens: int  # computed, first time
    num_generation_tokens: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine after a step; counters grow from the start of the process."""

    time: float
    step_id: int
    num_running: int
    num_waiting: int
    num_deferred: int  # of those that wait: held back by their tenant's own concurrency limit
    num_kv_blocks: int
    num_free_kv_blocks: int  # evictable cached blocks count as free
    num_preemptions: int
    num_prefix_queries: int  # tokens looked up in the prefix cache
    num_prefix_hits: int  # tokens found there
    num_drafts: int  # streams' steps with guessed tokens
    num_draft_tokens: int  # tokens guessed
    num_accepted_tokens: int  # of these, right
    virtual_time: float
    config_digest: str
    step_tokens: tuple[int, ...]  # tokens of each step since the last EngineStats
    step_seconds: tuple[float, ...]  # duration of each of these steps
    tenants: tuple[TenantStats, ...]  # those whose state changed since the last EngineStats
    retired_tenants: tuple[str, ...] = ()  # deleted since: what they had left is the default tenant's


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one step brought. `stats` comes at most every 100 ms while the engine works, and when it falls idle."""

    outputs: tuple[RequestOutput, ...]
    stats: EngineStats | None = None


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The core's loop ended by an error that it could not contain; the process exits after this message."""

    message: str


ToCore = AddRequest | AbortRequest | Reconfigure | Shutdown
FromCore = StartupProgress | EngineReady | StartupFailed | StepOutputs | EngineFailed
