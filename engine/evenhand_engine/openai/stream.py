"""Answers to completions and chat completions: one JSON object, or server-sent events as the tokens come."""

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from aiohttp import web

from evenhand_engine.backends.backend import Delta
from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.service import LOG_FIELDS, TENANT_ID
from evenhand_engine.openai.errors import error_body, refuse_dead_engine
from evenhand_engine.openai.events import EventStream, open_events
from evenhand_engine.openai.generation import Generation, merge
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.scheduler.request import FinishReason, TokenLogprobs
from evenhand_engine.text.detokenizer import Piece

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Format(Protocol):
    """How one endpoint writes its answers. A choice's `index` is that of its generation."""

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        """The fields that every object of one answer shares."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice that a stream begins with; None for none."""
        ...

    def choice(
        self,
        index: int,
        pieces: Sequence[Piece],
        finish_reason: str | None,
        *,
        streamed: bool,
        prompt_logprobs: Sequence[TokenLogprobs] = (),
    ) -> dict[str, Any]:
        """One choice: all of its text, or what a delta adds."""
        ...

    def additions(self, prompt_logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """More fields of an answer as a whole, or of the first event, by what is told of its first prompt."""
        ...


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    """A prompt counts once, however many choices continue it."""
    first_choices = [generation for generation in generations if generation.choice_index == 0]
    num_prompt_tokens = sum(generation.num_prompt_tokens for generation in first_choices)
    num_output_tokens = sum(generation.num_output_tokens for generation in generations)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(generation.num_cached_tokens for generation in first_choices)},
    }


async def answer(
    request: web.Request, body: SamplingFields, generations: Sequence[Generation], form: Format
) -> web.StreamResponse:
    """Read the generations and write their text in the endpoint's format."""
    try:
        if body.stream:
            return await _Events(request, body, generations, form).answer()
        return await _answer_whole(body, generations, form)
    finally:
        log_usage(request, generations)


def log_usage(request: web.Request, generations: Sequence[Generation]) -> None:
    """In the access log's line of this request."""
    used = usage(generations)
    request[LOG_FIELDS].update(
        prompt_tokens=used["prompt_tokens"],
        cached_tokens=used["prompt_tokens_details"]["cached_tokens"],
        output_tokens=used["completion_tokens"],
    )


async def _answer_whole(body: SamplingFields, generations: Sequence[Generation], form: Format) -> web.Response:
    pieces: list[list[Piece]] = [[] for _ in generations]
    reasons: list[str | None] = [None] * len(generations)
    told: list[Sequence[TokenLogprobs]] = [()] * len(generations)
    async with contextlib.aclosing(merge(generations)) as deltas:
        async for index, delta in deltas:
            pieces[index] += delta.pieces
            reasons[index] = _reason(delta)
            told[index] = delta.prompt_logprobs or told[index]
    chosen = _best(pieces, body.num_generated, body.n or 1)
    choices = [
        form.choice(index, pieces[i], reasons[i], streamed=False, prompt_logprobs=told[i])
        for index, i in enumerate(chosen)
    ]
    answer = {**form.envelope(streamed=False), "choices": choices, "usage": usage(generations)}
    return json_response({**answer, **form.additions(told[0])})


def _best(pieces: list[list[Piece]], num_generated: int, num_chosen: int) -> list[int]:
    """Of each prompt's choices those whose tokens were the likeliest in the mean, best first; all, if all are wanted."""
    if num_generated == num_chosen:
        return list(range(len(pieces)))

    def mean(index: int) -> float:
        told: list[float] = [found.logprob for piece in pieces[index] for found in piece.logprobs or ()]
        return sum(told) / max(1, len(told))

    groups = (range(first, first + num_generated) for first in range(0, len(pieces), num_generated))
    return [index for group in groups for index in sorted(group, key=mean, reverse=True)[:num_chosen]]


class _Events:
    """The answer to one request as a stream of events.

    Nothing is sent before the first request runs, so that whatever refuses it in the queue is an HTTP status; unless it
    waits longer than `--queue-heartbeat`, when the stream begins with comments and a refusal is an event.
    """

    def __init__(
        self, request: web.Request, body: SamplingFields, generations: Sequence[Generation], form: Format
    ) -> None:
        self._request = request
        self._door = request.app[DOOR]
        self._body = body
        self._generations = generations
        self._form = form
        self._envelope = form.envelope(streamed=True)

    async def answer(self) -> web.StreamResponse:
        async with contextlib.aclosing(merge(self._generations)) as deltas:
            events, first = await open_events(self._request, deltas)
            try:
                await self._send_opening(events)
                await self._send_delta(events, *await first)
                async for index, delta in deltas:
                    await self._send_delta(events, index, delta)
                if self._body.includes_usage:
                    await events.send({**self._envelope, "choices": [], "usage": usage(self._generations)})
            except Refusal as refusal:
                await self._send_refusal(events, refusal)
            except EngineDeadError:
                await self._send_refusal(events, refuse_dead_engine(draining=self._door.draining))
            return await events.close()

    async def _send_opening(self, events: EventStream) -> None:
        more = self._form.additions(())
        for index in range(len(self._generations)):
            if (choice := self._form.opening(index)) is not None:
                await events.send({**self._chunk(choice), **more})
                more = {}

    async def _send_delta(self, events: EventStream, index: int, delta: Delta) -> None:
        if not delta.pieces and delta.finish_reason is None:
            return
        choice = self._form.choice(index, delta.pieces, _reason(delta), streamed=True)
        if choice["finish_reason"] is not None and "tool_calls" in choice.get("delta", ()):
            await events.send(
                self._chunk({**choice, "finish_reason": None})
            )  # OpenAI's client sees no end beside a call
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
        await events.send(self._chunk(choice))

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._envelope, "choices": [choice]}
        if self._body.includes_continuous_usage:
            chunk["usage"] = usage(self._generations)
        elif self._body.includes_usage:
            chunk["usage"] = None
        return chunk

    async def _send_refusal(self, events: EventStream, refusal: Refusal) -> None:
        self._door.count_refusal(self._request[TENANT_ID], refusal.code)
        await events.send(error_body(refusal))


def _reason(delta: Delta) -> str | None:
    return None if delta.finish_reason is None else _FINISH_REASONS[delta.finish_reason]
