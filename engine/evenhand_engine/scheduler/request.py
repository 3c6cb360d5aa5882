"""Request: one prompt and what the scheduler knows of it. Owned and mutated by the scheduler alone."""

from array import array
from collections.abc import Iterable
from enum import StrEnum

import msgspec

_PRIOR_ACCEPTANCE = 0.5
_MOST_PRIORITY = 100  # either way: each has a line of its own


def bounded_priority(value: object) -> int:
    """What a client gives as its request's priority; 0 for what is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:  # NaN is not itself
        return 0
    return int(min(max(value, -_MOST_PRIORITY), _MOST_PRIORITY))


class FinishReason(StrEnum):
    """Why a request left the engine. Every request leaves exactly once, with exactly one of these."""

    STOP = "stop"  # an end-of-sequence or stop token, or (from the server) a stop string
    LENGTH = "length"  # max_tokens or the model's context is reached
    ABORT = "abort"  # the client is gone
    QUEUE_TIMEOUT = "queue_timeout"  # not started within the tenant's queueTimeout
    TENANT_SUSPENDED = "tenant_suspended"  # the tenant was suspended while the request was queued
    OVERLOADED = "overloaded"  # it can never fit: the tenant's KV ceiling or the cache is too small for it
    GRAMMAR = "grammar"  # what its output must look like became too complex to be followed
    ERROR = "error"  # the engine failed


class Reasoning(msgspec.Struct, frozen=True):
    """What an output may think before it says something, between two tokens that mark it; it does so once.

    Attributes:
        begin, end: the tokens.
        starts_inside: the prompt has ended with `begin`; else the output may have it.
        budget: after so many tokens of reasoning only `end` may come; None: as many as it likes.
    """

    begin: int
    end: int
    starts_inside: bool = False
    budget: int | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when generation ends.

    temperature 0 is greedy. top_k 0 keeps all tokens. `seed` makes the request's draws reproducible whatever it is
    batched with (the logits are so up to rounding). `stop_token_ids` holds the model's end-of-sequence ids too, unless the client asked to ignore them.
    `num_logprobs`: how many of the likeliest tokens to tell beside each output token's own; None: no log probabilities.
    `num_prompt_logprobs`: the same of the prompt's tokens, which are then all computed, cached or not. `grammar`: what the
    output must look like, as the runner's `structured` grammars write it; with `reasoning`, from its end on.

    The logits are changed first, in this order: only `allowed_token_ids` may come (None: all), no stop token within the first
    `min_tokens` outputs, and no last token of one of `bad_words_token_ids` whose other tokens are the last outputs;
    `logit_bias`, pairs of a token and what its logit gains, no token twice; `repetition_penalty` divides (below 0: multiplies)
    the logits of tokens in prompt or output; `frequency_penalty` is taken off a token's logit as often as the output has it,
    `presence_penalty` once if it does. `min_p` keeps tokens of at least that part of the likeliest one's probability, after the
    temperature, before top_k and top_p. All as vLLM's.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: frozenset[int] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: str | None = None
    reasoning: Reasoning | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """How likely a token was, and which tokens were likelier: natural logarithms of the model's own distribution.

    Before temperature, penalties and masks. `top_token_ids` are the most likely ones, best first, with `top_logprobs`;
    `rank` is the place of the token itself, counted from 1.
    """

    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """What a step gave one request: its next output tokens, drafts that were right first.

    Without token ids nothing could be sampled, and the request ends for the reason `failure`: ERROR where its logits were not
    finite, GRAMMAR where its grammar leaves no token any more.
    `logprobs` has an entry for each token if the request asked for them, else none. `prompt_logprobs`, with the first
    output of a request that asked for them, has one for each token of the prompt but the first.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    failure: FinishReason = FinishReason.ERROR


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """News of one request. The first has no tokens and tells that it was scheduled for the first time.

    `finish_reason` is set on the last one, exactly once for each request. `num_cached_tokens`: prompt tokens that a
    prefix hit spared; `num_preemptions`: how often it lost its blocks so far; `num_output_tokens`: outputs computed so
    far, on the last one. `logprobs` has an entry for each of `token_ids` if the request asked for them; `prompt_logprobs`
    comes with the first token.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_output_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Request:
    """One prompt on its way through the engine.

    Counts of tokens: `num_tokens` = prompt + confirmed outputs + outputs in flight (sampled on the device, not yet
    reported); `num_computed_tokens` of these have their keys and values in `block_table`, or are in a batch in flight.
    Prompt, chunk, decode and recompute are one case: a step schedules part of `num_pending_tokens`.
    """

    __slots__ = (
        "acceptance",
        "arrival_time",
        "block_hashes",
        "block_table",
        "cache_salt",
        "finish_reason",
        "guess",
        "max_num_tokens",
        "num_cached_tokens",
        "num_charged_tokens",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_preemptions",
        "num_prefix_blocks",
        "num_prompt_tokens",
        "num_sent_blocks",
        "position",
        "priority",
        "request_id",
        "sampling_params",
        "seat",
        "started_at",
        "tenant_id",
        "token_ids",
        "user",
    )
    num_choices = 1  # answers that run at once for it: here each is a request of its own

    def __init__(
        self,
        request_id: str,
        tenant_id: str,
        prompt_token_ids: Iterable[int],
        sampling_params: SamplingParams,
        arrival_time: float,
        *,
        user: str = "",
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        self.request_id = request_id
        self.tenant_id = tenant_id
        self.user = user
        self.priority = priority
        self.cache_salt = cache_salt
        self.sampling_params = sampling_params
        self.arrival_time = arrival_time
        self.position = 0  # in the order of arrival over all requests; the request_table counts
        self.token_ids = array("I", prompt_token_ids)  # prompt, then confirmed outputs
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = (
            self.num_prompt_tokens + sampling_params.max_tokens
        )  # the request_table cuts it to the model's
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # of the first admission: what a prefix hit spared
        self.num_charged_tokens = 0  # high-water mark: tokens below it are never charged again
        self.num_in_flight_tokens = 0  # outputs sampled by batches that are not yet updated
        self.num_preemptions = 0
        self.started_at: float | None = None  # when it last began to run; None: waiting
        self.seat = -1  # its number while it runs
        self.block_table: list[int] = []
        self.num_sent_blocks = 0  # first blocks of its table that a batch has told the runner
        self.block_hashes: list[bytes] = []  # of its full blocks, as far as they were computed
        self.num_prefix_blocks = 0  # first blocks that were cached when somebody last asked
        self.guess: tuple[int, ...] = ()  # what its next tokens may be, while a step computes the first of them
        self.acceptance = _PRIOR_ACCEPTANCE  # how likely the next token of a guess is right, by those so far
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_in_flight_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def may_use_prefixes(self) -> bool:
        """Whether a known prefix spares its computation: not where the logits of all its tokens are wanted."""
        return self.sampling_params.num_prompt_logprobs is None

    @property
    def is_at_end(self) -> bool:
        """Whether the output in flight is the last, so that there is nothing more to compute."""
        return self.num_computed_tokens + 1 >= self.max_num_tokens

    def __repr__(self) -> str:
        return f"Request({self.request_id}, {self.tenant_id}, {self.num_computed_tokens}/{self.num_tokens} tokens)"
