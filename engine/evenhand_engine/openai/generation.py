"""Generation: one prompt on its way through the engine, as text.

Joins the quota reservation, the engine's stream and the detokenizer of one prompt, and closes all three together in
whatever way it ends. Knows neither the API's formats nor HTTP's.
"""

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import NamedTuple, TypeVar

from evenhand_engine.backends.engine_client import Arrival
from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.admission import Cost, Reservation
from evenhand_engine.frontend.metrics import RequestMetrics
from evenhand_engine.frontend.service import Service
from evenhand_engine.messages import AddRequest
from evenhand_engine.openai.errors import refuse_finished
from evenhand_engine.openai.prompts import check_token_ids
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.scheduler.request import FinishReason, SamplingParams
from evenhand_engine.text.detokenizer import Detokenizer

T = TypeVar("T")
_CONTEXT_TOKENS = 8  # of the prompt that the detokenizer sees, for the spacing of the first word


class Delta(NamedTuple):
    """News of one generation: text that is now certain, and why it ended if it has."""

    text: str = ""
    finish_reason: FinishReason | None = None


class Generation:
    """One prompt.

    Attributes:
        num_output_tokens: tokens of the output so far.
        num_cached_tokens: tokens of the prompt that a prefix hit spared.
    """

    def __init__(
        self, service: Service, request: AddRequest, detokenizer: Detokenizer, reservation: Reservation, skip_stop: bool
    ) -> None:
        self.request = request
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._service = service
        self._detokenizer = detokenizer
        self._reservation = reservation
        self._skip_stop = skip_stop
        self._metrics = RequestMetrics(
            service.metrics,
            request.tenant_id,
            self.num_prompt_tokens,
            request.sampling_params.max_tokens,
            request.arrival_time,
        )
        self._outcome = ("aborted", "client_gone")
        self._num_preemptions = 0
        self._closed = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The first delta, without text, tells that the request is running; the last one has a finish reason.

        Raises Refusal if the engine ends the request without a result, EngineDeadError if it dies.
        """
        try:
            async with contextlib.aclosing(self._service.engine.generate(self.request)) as arrivals:
                async for arrival in arrivals:
                    delta = self._take(arrival)
                    if delta.finish_reason is not None:
                        self._outcome = ("finished", delta.finish_reason)
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except Refusal as refusal:
            self._outcome = ("refused" if refusal.status != 500 else "failed", refusal.code)
            raise
        except EngineDeadError:
            self._outcome = ("failed", "engine_dead")
            raise
        finally:
            self.close()

    def _take(self, arrival: Arrival) -> Delta:
        output, token_ids = arrival.output, arrival.output.token_ids
        self._raise_if_refused(output.finish_reason)
        self._service.admission.start(self._reservation)
        self._num_preemptions = output.num_preemptions
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.num_output_tokens += len(token_ids)
        self._metrics.start(output.num_cached_tokens, arrival.time)
        self._metrics.take_tokens(len(token_ids), arrival.time)
        if self._skip_stop and output.finish_reason is FinishReason.STOP:
            token_ids = token_ids[:-1]  # the stop token, which is counted but not shown
        text = self._detokenizer.push(token_ids)
        if self._detokenizer.stopped:
            self.num_output_tokens = self._detokenizer.num_tokens
            self._service.engine.abort(self.request.request_id, FinishReason.STOP, self.num_output_tokens)
            return Delta(text, FinishReason.STOP)
        if output.finish_reason is not None:
            text += self._detokenizer.flush()
        return Delta(text, output.finish_reason)

    def _raise_if_refused(self, reason: FinishReason | None) -> None:
        delay = self._service.admission.queue_delay(self.request.tenant_id)
        if reason is not None and (refusal := refuse_finished(reason, delay)) is not None:
            raise refusal

    def close(self) -> None:
        """Give back the unused quota and note the end; once, however often it is called."""
        if not self._closed:
            self._closed = True
            now = time.monotonic()
            self._service.admission.settle(self._reservation, self.num_output_tokens, now)
            self._metrics.end(*self._outcome, self._num_preemptions, now)


@contextlib.contextmanager
def begin(
    service: Service, tenant_id: str, body: SamplingFields, prompts: Sequence[list[int]], max_tokens: int | None
) -> Iterator[list[Generation]]:
    """Reserve quota for all prompts, or raise Refusal; on leaving, whatever was not used is given back."""
    admission = service.admission
    check_token_ids(service.tokenizer, body.stop_token_ids or (), "stop_token_ids")
    if any(not prompt for prompt in prompts):
        raise Refusal(400, "invalid_value", "A prompt has no tokens.", param="prompt")
    limits = [max_tokens or admission.max_output_tokens(tenant_id, len(prompt)) for prompt in prompts]
    if min(limits) < (body.min_tokens or 0):
        raise Refusal(400, "invalid_value", f"`min_tokens` is above {min(limits)}, the most.", param="min_tokens")
    costs = [Cost(len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
    reservations = admission.reserve(tenant_id, costs, time.monotonic())
    generations = [
        Generation(
            service,
            AddRequest(
                request_id=uuid.uuid4().hex,
                tenant_id=tenant_id,
                prompt_token_ids=prompt,
                sampling_params=_sampling_params(service, body, limit),
                arrival_time=time.monotonic(),
                user=body.user or "",
            ),
            _detokenizer(service, body, prompt),
            reservation,
            skip_stop=not body.include_stop_str_in_output,
        )
        for prompt, limit, reservation in zip(prompts, limits, reservations, strict=True)
    ]
    try:
        yield generations
    finally:
        for generation in generations:
            generation.close()


def _sampling_params(service: Service, body: SamplingFields, max_tokens: int) -> SamplingParams:
    defaults = service.tokenizer.sampling_defaults
    eos = frozenset[int]() if body.ignore_eos else service.tokenizer.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_first(body.temperature, defaults.temperature, 1.0),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=eos | frozenset(body.stop_token_ids or ()),
    )


def _first(value: T | None, recommended: T | None, otherwise: T) -> T:
    return value if value is not None else recommended if recommended is not None else otherwise


def _detokenizer(service: Service, body: SamplingFields, prompt: list[int]) -> Detokenizer:
    skip_special_tokens = body.skip_special_tokens is not False
    return Detokenizer(
        lambda token_ids: service.tokenizer.decode(token_ids, skip_special_tokens),
        body.stop_strings,
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        context=prompt[-_CONTEXT_TOKENS:],
    )


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of all generations as they come, each with the index of its generation.

    The first error of any ends them all; so does closing the iterator.
    """
    if len(generations) == 1:
        async with contextlib.aclosing(generations[0].deltas()) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta] | BaseException] = asyncio.Queue()

    async def pump(index: int, generation: Generation) -> None:
        try:
            async with contextlib.aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    arrived.put_nowait((index, delta))
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, generation)) for index, generation in enumerate(generations)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            num_open -= item[1].finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
