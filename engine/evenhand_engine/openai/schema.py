"""Request bodies, with OpenAI's and vLLM's field names; validated here, trusted after.

A field that this engine does not know is ignored, as by vLLM. One that it knows and cannot honour is refused, unless
it holds the value that asks for nothing.
"""

from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta

from evenhand_engine.errors import Refusal

_INT64 = 2**63
_MAX_STOP_STRINGS = 16
_MAX_PROMPTS = 256

NonNegative = Annotated[int, Meta(ge=0, lt=2**31)]
Positive = Annotated[int, Meta(ge=1, lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
UserName = Annotated[str, Meta(max_length=512)]  # the scheduler remembers thousands of them
StopString = Annotated[str, Meta(min_length=1, max_length=512)]

# Known fields that cannot be honoured -> the values, besides null, that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprob_token_ids": ([],),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "web_search_options": (),
}


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
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=_MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: NonNegative | None = None
    skip_special_tokens: bool | None = None
    user: UserName | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def includes_continuous_usage(self) -> bool:
        return self.includes_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of POST /v1/completions. `max_tokens` is 16 unless given, as OpenAI's and vLLM's; null: what is left."""

    prompt: str | list[Any]
    max_tokens: Positive | None = 16
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, all as text or all as token ids; raises Refusal 400 for anything else."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return _as_prompts(self.prompt)


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation. Several text parts are joined by line feeds, which is what templates expect."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        fields: dict[str, Any] = msgspec.to_builtins(self)
        fields["content"] = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
        return fields


class ChatFields(Protocol):
    """What makes a prompt of a conversation."""

    @property
    def messages(self) -> list[ChatMessage] | None: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def add_special_tokens(self) -> bool | None: ...
    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None: ...


class ChatCompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


T = TypeVar("T")


def parse_body(body: bytes, kind: type[T]) -> T:
    """Decode and validate a body; raises Refusal 400 that names the field."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        _refuse_unsupported(fields)
        request = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise Refusal(400, "invalid_json", "The body is nested too deeply.") from error
    if isinstance(request, SamplingFields) and request.stream_options is not None and not request.stream:
        message = "`stream_options` is for streams only: set `stream` too, or leave it out."
        raise Refusal(400, "invalid_value", message, param="stream_options")
    return request


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    for name in fields.keys() & _UNSUPPORTED.keys():
        if not _asks_for_nothing(fields[name], _UNSUPPORTED[name]):
            message = f"`{name}` is not supported by this engine: leave it out."
            raise Refusal(400, "unsupported_parameter", message, param=name)


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Equal to one of the neutral values, and a bool only if that is one: `"logprobs": 0` asks for something."""
    return value is None or any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral)


def _as_prompts(prompt: list[Any]) -> list[str] | list[list[int]]:
    if not prompt:
        raise Refusal(400, "invalid_value", "`prompt` is empty.", param="prompt")
    first = prompt[0]
    kind: Any = (
        list[str] if isinstance(first, str) else list[TokenId] if isinstance(first, int) else list[list[TokenId]]
    )
    try:
        prompts = msgspec.convert(prompt, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error).replace("`$", "`$.prompt")) from error
    if isinstance(first, int):
        return [prompts]
    if len(prompts) > _MAX_PROMPTS:
        raise Refusal(400, "invalid_value", f"`prompt` holds more than {_MAX_PROMPTS} prompts.", param="prompt")
    return prompts  # type: ignore[no-any-return]


def _invalid(message: str) -> Refusal:
    """msgspec writes "Expected `int`, got `str` - at `$.max_tokens`" or "... required field `messages`"."""
    problem, _, path = message.partition(" - at `$")
    param = path.strip("`.").split(".")[0].split("[")[0] or None
    if param is None and "field `" in problem:
        param = problem.split("field `")[1].split("`")[0]
    where = f"`{param}`: " if param else ""
    return Refusal(400, "invalid_value", f"{where}{problem}.", param=param)
