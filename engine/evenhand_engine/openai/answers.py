"""Answers, as the published document describes them: what OpenAI's clients read, and vLLM's additions.

Small ones are built from these structs. A completion and a chat are written as they come (`chat`, `completions`), and held to these
by the tests, which decode whatever the server says as nothing but this.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class ErrorDetails(msgspec.Struct, frozen=True):
    """`code` is the reason for machines, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class Error(msgspec.Struct, frozen=True):
    error: ErrorDetails


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["evenhand"] = "evenhand"
    root: str
    parent: None = None
    max_model_len: int


class Models(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Version(msgspec.Struct, frozen=True):
    version: str


class Load(msgspec.Struct, frozen=True):
    """Requests in flight, waiting ones too."""

    server_load: int


class ServedModel(msgspec.Struct, frozen=True):
    model: str
    served_model_name: list[str]
    max_model_len: int
    dtype: str | None


class KvCache(msgspec.Struct, frozen=True):
    """`num_gpu_blocks`: on CPUs too; null where that is not known."""

    block_size: int | None
    num_gpu_blocks: int | None


class ServedDevice(msgspec.Struct, frozen=True):
    device: str | None


class ServerConfig(msgspec.Struct, frozen=True):
    """How the server was started, in vLLM's places."""

    model_config: ServedModel
    cache_config: KvCache
    device_config: ServedDevice
    tool_call_parser: str
    reasoning_parser: str | None


class ServerInfo(msgspec.Struct, frozen=True):
    """As vLLM's; `vllm_config` is text unless `config_format=json` is asked for."""

    vllm_config: ServerConfig | str
    vllm_env: dict[str, str]
    system_env: dict[str, str]


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class LikelyToken(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken, frozen=True):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(msgspec.Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    reasoning: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One event of a stream. The last one holds no choice, and the usage where that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, frozen=True):
    """Of an answer, or what an event of a stream adds: only the last has a reason then."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """An answer, or an event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class RenderedSampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of an output would be chosen, with the model's defaults; vLLM's names."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int | None
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    min_tokens: int
    max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    logit_bias: dict[str, float]
    allowed_token_ids: list[int] | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    thinking_token_budget: int | None


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """What a request would be computed from, as vLLM's render endpoints tell it."""

    request_id: str
    model: str
    token_ids: list[int]
    features: None = None
    sampling_params: RenderedSampling
    stream: bool
    priority: int
