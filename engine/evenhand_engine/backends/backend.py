"""Backend: what the HTTP side needs of whoever generates, and the words that both use.

A Backend generates text for requests, each of which is one choice for one prompt. It hands out two things at different
paces: a Stream of Deltas, which its reader takes when it can, and news for an Observer, told at the moment they arrive.
Quota, metrics and service follow the second, so that nobody computes for free by not reading.
"""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from evenhand_engine.messages import EngineStats
from evenhand_engine.scheduler.request import FinishReason, SamplingParams, TokenLogprobs
from evenhand_engine.text.detokenizer import Piece
from evenhand_policy.config import SchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a backend serves.

    Attributes:
        model_name: its own name, served unless the command line gives others.
        max_model_len: most tokens of one request, prompt and output together.
        num_kv_blocks: size of the KV cache; None where that is not known.
        block_size: tokens in one KV block; None where that is not known.
        dtype: of the weights; None where that is not known.
        device: that computes; None where that is not known.
        knows_grammars: outputs can be made to follow a grammar.
        scores_prompts: log probabilities of prompts can be told.
    """

    model_name: str
    max_model_len: int
    num_kv_blocks: int | None = None
    block_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    knows_grammars: bool = False
    scores_prompts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One choice for one prompt: the unit that is queued, scheduled, charged and ended.

    A body with several prompts, or that asks for several choices, becomes as many of these.

    Attributes:
        request_id: unique in this process.
        prompt_token_ids: array of typecode "I"; shared by the choices of one prompt, so never changed.
        arrival_time: `time.monotonic()` at which it passed the door.
        user: orders requests inside a tenant whose fairness is PerUser.
        priority: orders them where it is Priority; the lowest goes first.
        stop: strings at which the text ends; not part of it unless `include_stop`, which goes for stop tokens too.
        skip_special_tokens: leave special tokens out of the text.
        keep_stop_token: a stop token that is not shown comes all the same, in a piece without text.
    """

    request_id: str
    tenant_id: str
    prompt_token_ids: "array[int]"
    sampling_params: SamplingParams
    arrival_time: float
    user: str = ""
    priority: int = 0
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_stop_token: bool = False


class Delta(msgspec.Struct, frozen=True, gc=False):
    """News of one stream since the last: text that is certain now, and why it ended if it has.

    Attributes:
        pieces: text with the tokens that it was made of; several where the reader was slower than the backend.
        num_tokens: output tokens that came since the last delta, up to and with the one that completed a stop string.
            More than the pieces hold where text is held back, and where a stop token is not shown.
        finish_reason: set on the last delta of a stream.
        prompt_logprobs: of all the prompt's tokens but the first, once, if they were asked for.
        stop_string: which one ended it; None: none did.
    """

    pieces: Sequence[Piece] = ()
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    stop_string: str | None = None


class Ending(NamedTuple):
    """How a request ended, as the backend knows it.

    Attributes:
        finish_reason: None if the backend died.
        num_output_tokens: outputs that were computed for it and count, read or not.
        num_preemptions: how often it lost its KV blocks.
    """

    finish_reason: FinishReason | None
    num_output_tokens: int
    num_preemptions: int = 0


Say = Callable[[str], bool]
"""Takes a text in the event loop, or does nothing and returns False. Raises nothing."""


class Observer(Protocol):
    """Follows one request as things happen to it, whether or not its client reads. Called in the event loop.

    The calls are one `started` at most, then `generated` any number of times, then one `ended`, always. `now` is the
    `time.monotonic()` at which the news reached this process.
    """

    def started(self, num_cached_tokens: int, now: float) -> None:
        """It has left the queue; `num_cached_tokens` of its prompt were spared by a prefix hit."""
        ...

    def generated(self, num_tokens: int, now: float) -> None:
        """So many more tokens of its output have come."""
        ...

    def ended(self, ending: Ending, now: float) -> None:
        """Nothing more will be computed for it. Comes after a `close` too, once the backend has let go."""
        ...


class Stream(Protocol):
    """Deltas of one request, for one reader, who takes them at his own pace.

    The first delta, without text, tells that the request has left the queue; the last has a finish reason. What comes while
    nobody takes it is coalesced into one delta.
    """

    @property
    def num_taken(self) -> int:
        """Tokens of the deltas that were taken, and of the text."""
        ...

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` in the event loop whenever there is something to take; now, if there is. It raises nothing."""
        ...

    def pass_text(self, say: Say | None) -> None:
        """Offer text to `say` as it comes, for a reader who wants to know nothing else; None: no more.

        For as long as text is all the news and depends on no other token: once anything else comes, or `say` does not take a text,
        that is in the next delta and the offer is over. What is taken counts as if a delta had been.
        """
        ...

    def take(self) -> Delta | None:
        """All that has come since the last; None: nothing. Raises EngineDeadError if nothing more will, as the backend died.

        Where that is to be told after what is taken, `listener` is called before this returns.
        """
        ...

    def finish(self) -> None:
        """End the request as if it had reached its limit, with what has come so far; nothing if it has ended."""
        ...

    def close(self) -> None:
        """End the request if it has not ended; nothing more can be taken. The Observer is told when it has."""
        ...


class Enforcer(Protocol):
    """Whatever enforces one scheduler config, and says how it goes."""

    @property
    def stats(self) -> EngineStats | None:
        """The latest state of the scheduler behind it; None until the first."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the backend is gone, for the log alone; None while it lives."""
        ...

    @property
    def died(self) -> asyncio.Event:
        """Set when it is gone."""
        ...

    @property
    def info(self) -> ModelInfo:
        """What it serves; known once it has started."""
        ...

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended, closed ones that the backend has yet to let go among them."""
        ...

    def reconfigure(self, config: SchedulerConfig, num_replicas: int = 1) -> None:
        """Enforce `config` from now on; `num_replicas` backends share its limits."""
        ...

    def on_stats(self, listener: Callable[[EngineStats], None]) -> None:
        """Call `listener` with every EngineStats that comes."""
        ...

    def seconds_without_progress(self, now: float) -> float:
        """How long it has had work and done none of it; 0 while it has none."""
        ...

    async def close(self, timeout: float = 5.0) -> None:
        """End it; every stream ends with EngineDeadError, and every Observer is told."""
        ...


class Backend(Enforcer, Protocol):
    """Generates, one stream for each request."""

    def generate(self, request: GenerationRequest, observer: Observer) -> Stream:
        """Begin a request; it is in the backend's hands when this returns. Raises EngineDeadError, and then no
        Observer is told anything."""
        ...
