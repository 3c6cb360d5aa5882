"""Answers to completions and chat completions: one JSON object, or server-sent events as the tokens come."""

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.service import LOG_FIELDS, SERVICE, TENANT_ID
from evenhand_engine.openai.errors import error_body, refuse_dead_engine
from evenhand_engine.openai.generation import Delta, Generation, merge
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.scheduler.request import FinishReason

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Format(Protocol):
    """How one endpoint writes its answers."""

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        """The fields that every object of one answer shares."""
        ...

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice that a stream begins with; None for none."""
        ...

    def choice(self, index: int, text: str, finish_reason: str | None, *, streamed: bool) -> dict[str, Any]:
        """One choice: all of its text, or what a delta adds."""
        ...


def usage(generations: Sequence[Generation]) -> dict[str, Any]:
    num_prompt_tokens = sum(generation.num_prompt_tokens for generation in generations)
    num_output_tokens = sum(generation.num_output_tokens for generation in generations)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(generation.num_cached_tokens for generation in generations)},
    }


async def answer(
    request: web.Request, body: SamplingFields, generations: Sequence[Generation], form: Format
) -> web.StreamResponse:
    """Run the generations and write their text in the endpoint's format."""
    try:
        if body.stream:
            return await _answer_events(request, body, generations, form)
        return await _answer_whole(generations, form)
    finally:
        request[LOG_FIELDS].update(
            prompt_tokens=sum(generation.num_prompt_tokens for generation in generations),
            cached_tokens=sum(generation.num_cached_tokens for generation in generations),
            output_tokens=sum(generation.num_output_tokens for generation in generations),
        )


async def _answer_whole(generations: Sequence[Generation], form: Format) -> web.Response:
    texts = [""] * len(generations)
    reasons: list[str | None] = [None] * len(generations)
    async with contextlib.aclosing(merge(generations)) as deltas:
        async for index, delta in deltas:
            texts[index] += delta.text
            reasons[index] = _reason(delta)
    choices = [form.choice(i, text, reasons[i], streamed=False) for i, text in enumerate(texts)]
    return json_response({**form.envelope(streamed=False), "choices": choices, "usage": usage(generations)})


async def _answer_events(
    request: web.Request, body: SamplingFields, generations: Sequence[Generation], form: Format
) -> web.StreamResponse:
    """Nothing is sent before the first request runs, so that whatever refuses it in the queue is an HTTP status."""
    envelope = form.envelope(streamed=True)

    def chunk(*choices: dict[str, Any]) -> dict[str, Any]:
        if body.includes_continuous_usage:
            return {**envelope, "choices": choices, "usage": usage(generations)}
        return {**envelope, "choices": choices} | ({"usage": None} if body.includes_usage else {})

    async with contextlib.aclosing(merge(generations)) as deltas:
        first = await anext(deltas)
        events = await EventStream.open(request)
        try:
            for index in range(len(generations)):
                if (choice := form.opening(index)) is not None:
                    await events.send(chunk(choice))
            await _send_delta(events, chunk, form, *first)
            async for index, delta in deltas:
                await _send_delta(events, chunk, form, index, delta)
            if body.includes_usage:
                await events.send({**envelope, "choices": [], "usage": usage(generations)})
        except Refusal as refusal:
            await _send_refusal(request, events, refusal)
        except EngineDeadError:
            await _send_refusal(request, events, refuse_dead_engine(draining=request.app[SERVICE].draining))
        return await events.close()


async def _send_delta(events: "EventStream", chunk: Any, form: Format, index: int, delta: Delta) -> None:
    if delta.text or delta.finish_reason is not None:
        await events.send(chunk(form.choice(index, delta.text, _reason(delta), streamed=True)))


async def _send_refusal(request: web.Request, events: "EventStream", refusal: Refusal) -> None:
    request.app[SERVICE].metrics.count_refusal(request[TENANT_ID], refusal.code)
    await events.send(error_body(refusal))


def _reason(delta: Delta) -> str | None:
    return None if delta.finish_reason is None else _FINISH_REASONS[delta.finish_reason]


class EventStream:
    """Server-sent events, ended by `[DONE]` as OpenAI's are."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response

    @classmethod
    async def open(cls, request: web.Request) -> "EventStream":
        """Send status 200 and the headers."""
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        return cls(response)

    async def send(self, event: dict[str, Any]) -> None:
        """Waits while the client reads too slowly."""
        await self._response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")

    async def close(self) -> web.StreamResponse:
        await self._response.write(b"data: [DONE]\n\n")
        await self._response.write_eof()
        return self._response
