"""Generation: one choice for one prompt, from its quota to its text.

Joins the claim on the quota and the backend's stream of one choice, and sees that each ends exactly once.
What was computed comes from the backend (`Observer`), what was said from whoever reads; quota follows the first.
Knows neither the API's formats nor HTTP's.
"""

import contextlib
import functools
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from evenhand_engine.backends.backend import Delta, Ending, GenerationRequest, Say, Stream
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.claims import Claim, Demand
from evenhand_engine.frontend.engine_service import EngineService
from evenhand_engine.openai.errors import refuse_finished
from evenhand_engine.openai.sampling import choice_params
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.scheduler.request import FinishReason, SamplingParams

_MAX_CHOICES = 256  # of one body
_AS_LENGTH = {FinishReason.STOP: FinishReason.LENGTH}
_RESULTS = (FinishReason.STOP, FinishReason.LENGTH)


class Unanswered(Exception):
    """A request ended without a result, in words of the backend."""

    def __init__(self, tenant_id: str, reason: FinishReason) -> None:
        super().__init__(reason)
        self.tenant_id = tenant_id
        self.reason = reason


class Generation:
    """One choice: its Deltas, and the backend's Observer.

    The first delta, without text, tells that the request is running; the last one has a finish reason. `Deltas` reads them.

    Attributes:
        request: what the backend is asked for.
        prompt_index: which of the body's prompts it continues.
        choice_index: which of that prompt's choices it is.
        take: see `Stream`; what a last delta says, `conclude` knows. An attribute, since it is called for every token.
        num_cached_tokens: tokens of the prompt that a prefix hit spared.

    With `is_hidden` nothing of its output is told: a request for the prompt alone computes a token that nobody asked for.
    """

    __slots__ = (
        "_claim",
        "_is_hidden",
        "_listener",
        "_service",
        "_stream",
        "choice_index",
        "generated",
        "num_cached_tokens",
        "prompt_index",
        "request",
        "take",
    )

    def __init__(
        self,
        service: EngineService,
        request: GenerationRequest,
        claim: Claim,
        *,
        prompt_index: int = 0,
        choice_index: int = 0,
        is_hidden: bool = False,
    ) -> None:
        self.request = request
        self.prompt_index = prompt_index
        self.choice_index = choice_index
        self.num_cached_tokens = 0
        self._is_hidden = is_hidden
        self._service = service
        self._claim = claim
        self._stream: Stream | None = None
        self._listener: Callable[[], None] = _ignore
        self.generated = claim.generated  # of the Observer: all of it is the claim's, and it is called for every token
        claim.exhausted = self._finish

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output that were read so far."""
        return 0 if self._stream is None or self._is_hidden else self._stream.num_taken

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    def begin(self) -> None:
        """Hand the request to the backend. Raises EngineDeadError."""
        self._stream = self._service.backend.generate(self.request, self)
        self.take = self._take_hidden if self._is_hidden else self._stream.take

    # -- what is read

    def listen(self, listener: Callable[[], None]) -> None:
        """See `Stream`."""
        assert self._stream is not None, "the generation has not begun"
        self._listener = listener
        self._stream.listen(listener)

    def pass_text(self, say: Say | None) -> None:
        """See `Stream`."""
        if self._stream is not None and not self._is_hidden:
            self._stream.pass_text(say)

    def conclude(self, delta: Delta) -> Delta:
        """What is said of the last delta; raises Unanswered, once everything that came before was taken."""
        reason = delta.finish_reason
        if reason in _RESULTS:
            return delta
        assert reason is not None
        unanswered = Unanswered(self.request.tenant_id, reason)
        if not delta.pieces:
            raise unanswered
        self.take = functools.partial(_fail, unanswered)
        self._listener()  # what came before it first
        return msgspec.structs.replace(delta, finish_reason=None)

    def _take_hidden(self) -> Delta | None:
        assert self._stream is not None, "the generation has not begun"
        delta = self._stream.take()
        if delta is None:
            return None
        reason = delta.finish_reason
        reason = None if reason is None else _AS_LENGTH.get(reason, reason)
        return msgspec.structs.replace(delta, pieces=(), num_tokens=0, finish_reason=reason)

    def close(self) -> None:
        """End the request if it has not ended, such as when its client is gone; may be called again."""
        if self._stream is not None:
            self._stream.close()
        else:
            self._claim.ended("failed", "engine_dead", 0, 0, time.monotonic())

    # -- what is computed: backend.Observer

    def started(self, num_cached_tokens: int, now: float) -> None:
        self.num_cached_tokens = num_cached_tokens
        self._claim.started(num_cached_tokens, now)

    def ended(self, ending: Ending, now: float) -> None:
        outcome, reason = _outcome(ending.finish_reason)
        self._claim.ended(outcome, reason, ending.num_output_tokens, ending.num_preemptions, now)

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.finish()


def _ignore() -> None: ...


def _fail(error: Exception) -> Delta | None:
    raise error


def _outcome(reason: FinishReason | None) -> tuple[str, str]:
    """How a request ended, for the metrics: outcome and reason."""
    if reason is None:
        return "failed", "engine_dead"
    if reason is FinishReason.ABORT:
        return "aborted", "client_gone"
    if (refusal := refuse_finished(reason, 0.0)) is not None:
        return "failed" if reason in (FinishReason.GRAMMAR, FinishReason.ERROR) else "refused", refusal.code
    return "finished", reason


@contextlib.asynccontextmanager
async def begin(
    service: EngineService,
    tenant_id: str,
    body: SamplingFields,
    prompts: "Sequence[array[int]]",
    params: SamplingParams,
    max_tokens: int | None,
    *,
    num_taken: int = 0,
) -> AsyncIterator[list[Generation]]:
    """Reserve quota for all choices of all prompts and begin them, or raise Refusal or EngineDeadError.

    The choices of a prompt follow each other, as in an answer of OpenAI's. On leaving, whatever still runs is ended.
    `params`: what they have in common; `num_taken`: requests of the quota that `Admission.check` has taken.
    """
    if any(not prompt for prompt in prompts):
        raise Refusal(400, "invalid_value", "A prompt has no tokens.", param="prompt")
    is_hidden, max_tokens = max_tokens == 0, 1 if max_tokens == 0 else max_tokens
    choices = [(prompt, choice) for prompt in range(len(prompts)) for choice in range(body.num_generated)]
    if len(choices) > _MAX_CHOICES:
        raise Refusal(400, "invalid_value", f"`n` choices of each prompt are more than {_MAX_CHOICES}.", param="n")
    demand = Demand(
        prompt_lengths=tuple(map(len, prompts)),
        num_choices=body.num_generated,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        num_taken=num_taken,
    )
    claims = await service.door.reserve(tenant_id, demand)
    generations = [
        Generation(
            service,
            _request(tenant_id, body, prompts[prompt], choice_params(params, claim.max_tokens, choice)),
            claim,
            prompt_index=prompt,
            choice_index=choice,
            is_hidden=is_hidden,
        )
        for (prompt, choice), claim in zip(choices, claims, strict=True)
    ]
    try:
        for generation in generations:
            generation.begin()
        yield generations
    finally:
        for generation in generations:
            generation.close()


def _request(tenant_id: str, body: SamplingFields, prompt: "array[int]", params: SamplingParams) -> GenerationRequest:
    return GenerationRequest(
        request_id=uuid.uuid4().hex,
        tenant_id=tenant_id,
        prompt_token_ids=prompt,
        sampling_params=params,
        arrival_time=time.monotonic(),
        user=body.user or "",
        priority=body.priority,
        stop=body.stop_strings,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        keep_stop_token=bool(body.return_token_ids),
    )
