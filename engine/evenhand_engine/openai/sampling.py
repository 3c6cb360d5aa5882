"""Sampling: from a body's fields to the engine's SamplingParams. Pure."""

import secrets
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from evenhand_engine.backends.backend import ModelInfo
from evenhand_engine.errors import Refusal
from evenhand_engine.openai.prompts import check_token_ids
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.scheduler.request import Reasoning, SamplingParams
from evenhand_engine.text.tokenizer import Tokenizer

T = TypeVar("T")

_MAX_BIAS = 100.0


def check_answerable(body: SamplingFields, info: ModelInfo) -> None:
    """Raises Refusal 400 for what the engine cannot tell, or a stream cannot, since it is known after its beginning."""
    if body.num_prompt_logprobs is not None and not info.scores_prompts:
        param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        message = "Log probabilities of prompts are not supported on this engine's device."
        raise Refusal(400, "unsupported_parameter", message, param=param)
    if body.stream and body.prompt_logprobs is not None:
        message = "`prompt_logprobs` cannot be streamed."
        raise Refusal(400, "invalid_value", message, param="prompt_logprobs")
    if body.stream and body.num_generated > (body.n or 1):
        raise Refusal(400, "invalid_value", "`best_of` above `n` cannot be streamed.", param="best_of")


def sampling_params(
    body: SamplingFields, tokenizer: Tokenizer, grammar: str | None = None, reasoning: Reasoning | None = None
) -> SamplingParams:
    """What all choices of a body have in common; their limits are still to come. `grammar`, `reasoning`: of the output.

    Raises Refusal 400 for token ids that are none of the model's, and where nothing could be drawn.
    """
    defaults = tokenizer.sampling_defaults
    allowed = frozenset(body.allowed_token_ids or ()) or None
    bias = _bias(body)
    for name, ids in (("allowed_token_ids", allowed), ("logit_bias", bias), ("stop_token_ids", body.stop_token_ids)):
        check_token_ids(tokenizer, list(ids or ()), name)
    eos = frozenset[int]() if body.ignore_eos else tokenizer.eos_token_ids
    stop_token_ids = eos | frozenset(body.stop_token_ids or ())
    if allowed is not None and body.min_tokens and allowed <= stop_token_ids:
        message = "With `min_tokens` some of `allowed_token_ids` must be no stop tokens."
        raise Refusal(400, "invalid_value", message, param="allowed_token_ids")
    return SamplingParams(
        max_tokens=0,
        temperature=_first(body.temperature, defaults.temperature, 1.0),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=tuple((token_id, max(-_MAX_BIAS, min(value, _MAX_BIAS))) for token_id, value in bias.items()),
        allowed_token_ids=allowed,
        bad_words_token_ids=tuple(dict.fromkeys(_spellings(body, tokenizer))),
        seed=secrets.randbits(63) if body.seed is None or body.seed == -1 else body.seed,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=stop_token_ids,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        grammar=grammar,
        reasoning=reasoning,
    )


def choice_params(params: SamplingParams, max_tokens: int, choice: int) -> SamplingParams:
    """Choices of one request differ from each other; of a seeded one each is as reproducible as the first."""
    return msgspec.structs.replace(params, max_tokens=max_tokens, seed=(params.seed + choice) % 2**63)


def _bias(body: SamplingFields) -> dict[int, float]:
    """By token id, which JSON writes as text."""
    found: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal()) or len(key) > 10:
            message = f"`logit_bias`: {key[:100]!r} is no token id."
            raise Refusal(400, "invalid_value", message, param="logit_bias")
        found[int(key)] = value
    return found


def _spellings(body: SamplingFields, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Tokens of each bad word as it begins a text, and as it follows a space."""
    for word in body.bad_words or ():
        for text in (word.lstrip(), " " + word.lstrip()):
            if ids := tokenizer.encode(text, add_special_tokens=False):
                yield tuple(ids)


def _first(value: T | None, recommended: T | None, otherwise: T) -> T:
    return value if value is not None else recommended if recommended is not None else otherwise
