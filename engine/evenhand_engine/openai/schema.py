"""Request bodies, with OpenAI's and vLLM's field names; validated here, trusted after.

A field that this engine does not know is ignored, as by vLLM. One that it knows and cannot honour is refused, unless
it holds the value that asks for nothing. What may be large or of any shape stays `Raw`, for `prompts` to decode.
"""

from typing import Annotated, Any, Protocol

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from evenhand_engine.openai.members import (
    ChatMessage,
    Choices,
    NamedToolChoice,
    Object,
    ResponseFormat,
    StructuredOutputs,
    TokenId,
    Tool,
    ToolChoice,
    holds,
)

_INT64 = 2**63
_MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20

NonNegative = Annotated[int, Meta(ge=0, lt=2**31)]
Positive = Annotated[int, Meta(ge=1, lt=2**31)]
UserName = Annotated[str, Meta(max_length=512)]  # the scheduler remembers thousands of them
ShortText = Annotated[str, Meta(max_length=64)]
StopString = Annotated[str, Meta(min_length=1, max_length=512)]
BadWord = Annotated[str, Meta(pattern=r"\S", max_length=256)]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]

# Known fields that cannot be honoured -> the values, besides null, that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),  # of chat; completions have it
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),  # of chat; completions have it
    "function_call": ("none",),
    "functions": ([],),
    "guided_decoding_backend": (),
    "include_reasoning": (True,),  # of completions, like tools; chat has them
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "moderation": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),  # of chat; completions have it
    "thinking_token_budget": (-1,),  # of completions; chat has it
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}


DECLINED_BY = {"tools": "tool_choice", "functions": "function_call"}
"""An offer, and the field whose "none" says that it must not be taken: then the answer is as if there were none."""


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat completions have in common. None: the model's default, else OpenAI's."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=256)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=_MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: NonNegative | None = None
    skip_special_tokens: bool | None = None
    response_format: Annotated[Raw, holds(ResponseFormat)] | UnsetType = UNSET
    structured_outputs: Annotated[Raw, holds(StructuredOutputs)] | UnsetType = UNSET
    guided_json: Annotated[Raw, holds(Object, str)] | UnsetType = UNSET
    guided_regex: Annotated[Raw, holds(str)] | UnsetType = UNSET
    guided_choice: Annotated[Raw, holds(Choices)] | UnsetType = UNSET
    guided_grammar: Annotated[Raw, holds(str)] | UnsetType = UNSET
    guided_whitespace_pattern: ShortText | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    request_id: RequestId | None = None
    user: UserName | None = None
    priority: Any = 0  # an integer within bounds once it is parsed: whatever front ends add is taken or ignored

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens to tell beside each output token; None: no log probabilities at all."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.prompt_logprobs

    @property
    def num_generated(self) -> int:
        """Choices to generate for each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def includes_continuous_usage(self) -> bool:
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of POST /v1/completions. `max_tokens` is 16 unless given, as OpenAI's and vLLM's; null: what is left.

    0 is for an echo alone.
    """

    prompt: Annotated[Raw, holds(str, list[str], list[TokenId], list[list[TokenId]])] | UnsetType
    max_tokens: NonNegative | None = 16
    max_completion_tokens: Positive | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | bool | None = None
    echo: bool | None = None
    suffix: Annotated[Raw, holds(str)] | UnsetType = UNSET
    add_special_tokens: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.logprobs is None or self.logprobs is False:
            return 0 if self.num_generated > (self.n or 1) else None  # the best are chosen by them
        return int(self.logprobs)

    @property
    def limit(self) -> int | None:
        """Most tokens of an output; None: what is left."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def tells_logprobs(self) -> bool:
        return self.logprobs is not None and self.logprobs is not False

    @property
    def num_prompt_logprobs(self) -> int | None:
        """With an echo the prompt's tokens have theirs too."""
        echoed = self.num_logprobs if self.echo and self.tells_logprobs else None
        return max((n for n in (self.prompt_logprobs, echoed) if n is not None), default=None)

    @property
    def num_generated(self) -> int:
        return max(self.n or 1, self.best_of or 1)


class ChatFields(Protocol):
    """What makes a prompt of a conversation."""

    @property
    def messages(self) -> Raw | UnsetType: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def add_special_tokens(self) -> bool | None: ...
    @property
    def chat_template_kwargs(self) -> Raw | UnsetType: ...
    @property
    def reasoning_effort(self) -> str | None: ...


class ChatCompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[Raw, holds(list[ChatMessage])] | UnsetType
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: Annotated[Raw, holds(Object)] | UnsetType = UNSET
    reasoning_effort: ShortText | None = None
    tools: Annotated[Raw, holds(list[Tool])] | UnsetType = UNSET
    tool_choice: Annotated[Raw, holds(ToolChoice, NamedToolChoice)] | UnsetType = UNSET
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Raw, holds(list[ChatMessage])] | UnsetType = UNSET
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: Annotated[Raw, holds(Object)] | UnsetType = UNSET
    reasoning_effort: ShortText | None = None
    tools: Annotated[Raw, holds(list[Tool])] | UnsetType = UNSET
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[Raw, holds(list[TokenId])] | UnsetType
