"""POST /v1/messages and /v1/messages/count_tokens."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from evenhand_engine.anthropic.answers import TokenCount
from evenhand_engine.anthropic.blocks import Blocks, Event
from evenhand_engine.anthropic.bodies import PARAMS, CountTokensRequest, MessageRequest, as_chat
from evenhand_engine.backends.backend import Delta
from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.service import ENGINE, REQUEST_ID, TENANT_ID, EngineService
from evenhand_engine.openai.bodies import parse_body
from evenhand_engine.openai.chat import ReadChat, message_reader, read_chat
from evenhand_engine.openai.errors import error_body, refuse_dead_engine
from evenhand_engine.openai.events import EventStream, open_events
from evenhand_engine.openai.generation import Generation, begin, merge
from evenhand_engine.openai.messages import MessageReader
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.stream import log_usage, usage
from evenhand_engine.openai.structure import check_structure
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.text.detokenizer import text_of


async def create_message(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[ENGINE], request[TENANT_ID]
    num_taken = await service.door.check(tenant_id)
    asked, is_streamed = await read_request(request, functools.partial(_read, service, MessageRequest))
    chat, limit = asked.body, asked.body.max_completion_tokens
    message = {
        "id": f"msg_{request[REQUEST_ID]}",
        "type": "message",
        "role": "assistant",
        "model": chat.model or service.model_names[0],
    }
    try:
        await check_structure(service, tenant_id, asked.structure)
        prompts, params = [asked.prompt], asked.params
        async with begin(service, tenant_id, chat, prompts, params, limit, num_taken=num_taken) as generations:
            answer = _Answer(request, message, generations, message_reader(service, chat, asked.tools))
            try:
                return await (answer.stream() if is_streamed else answer.whole())
            finally:
                log_usage(request, generations)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


async def count_tokens(request: web.Request) -> web.Response:
    service = request.app[ENGINE]
    await service.door.count_request(request[TENANT_ID])
    asked, _ = await read_request(request, functools.partial(_read, service, CountTokensRequest))
    return json_response(TokenCount(len(asked.prompt)))


def _read(service: EngineService, kind: type[CountTokensRequest], raw: bytes) -> tuple[ReadChat, bool]:
    body = parse_body(raw, kind)
    try:
        chat = as_chat(body, tells_reasoning=service.settings.reasoning_parser is not None)
        return read_chat(service, chat), bool(body.stream)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


class _Answer:
    """One message, as an object or as the events that build it."""

    def __init__(
        self, request: web.Request, message: dict[str, Any], generations: Sequence[Generation], reader: MessageReader
    ) -> None:
        self._request = request
        self._message = message
        self._generations = generations
        self._reader = reader
        self._blocks = Blocks()

    async def whole(self) -> web.Response:
        text, last = "", Delta()
        async with contextlib.aclosing(merge(self._generations)) as deltas:
            async for _, delta in deltas:
                text += text_of(delta.pieces)
                last = delta
        self._blocks.take(self._reader.delta(text, is_last=True))
        answer = {**self._message, "content": self._blocks.content(), **self._stop(last), "usage": self._usage()}
        return json_response(answer)

    async def stream(self) -> web.StreamResponse:
        async with contextlib.aclosing(merge(self._generations)) as deltas:
            events, first = await open_events(self._request, deltas)
            try:
                _, delta = await first
                begun = {**self._message, "content": [], "stop_reason": None, "stop_sequence": None}
                await _send(events, {"type": "message_start", "message": {**begun, "usage": self._usage()}})
                while True:
                    is_last = delta.finish_reason is not None
                    taken = self._reader.delta(text_of(delta.pieces), is_last=is_last)
                    await _send(events, *self._blocks.take(taken))
                    if is_last:
                        break
                    _, delta = await anext(deltas)
                await _send(
                    events,
                    *self._blocks.end(),
                    {"type": "message_delta", "delta": self._stop(delta), "usage": self._usage()},
                    {"type": "message_stop"},
                )
            except Refusal as refusal:
                await self._fail(events, refusal)
            except EngineDeadError:
                await self._fail(events, refuse_dead_engine(draining=self._request.app[DOOR].draining))
            return await events.close(b"")

    async def _fail(self, events: EventStream, refusal: Refusal) -> None:
        self._request.app[DOOR].count_refusal(self._request[TENANT_ID], refusal.code)
        await _send(events, {"type": "error", **error_body(refusal)})

    def _stop(self, last: Delta) -> dict[str, Any]:
        """Why it ended: a call goes before the end of a turn."""
        if last.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif self._reader.has_calls:
            reason = "tool_use"
        else:
            reason = "end_turn" if last.stop_string is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": last.stop_string if reason == "stop_sequence" else None}

    def _usage(self) -> dict[str, Any]:
        """Here what a prefix hit spared is no input."""
        used = usage(self._generations)
        cached = used["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": used["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": used["completion_tokens"],
        }


async def _send(events: EventStream, *sent: Event) -> None:
    for event in sent:
        await events.send_named(event)
