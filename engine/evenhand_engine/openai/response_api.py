"""POST /v1/responses: OpenAI's newer form of a chat. Stateless: every request brings its whole conversation."""

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.service import ENGINE, REQUEST_ID, TENANT_ID, EngineService
from evenhand_engine.openai.bodies import parse_body
from evenhand_engine.openai.chat import ReadChat, message_reader, read_chat
from evenhand_engine.openai.errors import refuse_dead_engine
from evenhand_engine.openai.events import EventStream, open_events
from evenhand_engine.openai.generation import Generation, begin, merge
from evenhand_engine.openai.messages import MessageReader
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.response_bodies import PARAMS, ResponseRequest, as_chat, echoed
from evenhand_engine.openai.response_items import Event, ResponseItems
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.stream import log_usage, usage
from evenhand_engine.openai.structure import check_structure
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.text.detokenizer import text_of


async def create_response(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[ENGINE], request[TENANT_ID]
    num_taken = await service.door.check(tenant_id)
    asked, fields, is_streamed = await read_request(request, functools.partial(_read, service))
    chat = asked.body
    response = {
        "id": f"resp_{request[REQUEST_ID]}",
        "object": "response",
        "created_at": int(time.time()),
        "model": chat.model or service.model_names[0],
        "error": None,
        "incomplete_details": None,
        **fields,
    }
    prompts, limit = [asked.prompt], chat.max_completion_tokens
    try:
        await check_structure(service, tenant_id, asked.structure)
        async with begin(service, tenant_id, chat, prompts, asked.params, limit, num_taken=num_taken) as generations:
            answer = _Answer(request, response, generations, message_reader(service, chat, asked.tools))
            try:
                return await (answer.stream() if is_streamed else answer.whole())
            finally:
                log_usage(request, generations)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


def _read(service: EngineService, raw: bytes) -> tuple[ReadChat, dict[str, Any], bool]:
    body = parse_body(raw, ResponseRequest)
    try:
        return read_chat(service, as_chat(body)), echoed(body), bool(body.stream)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


class _Answer:
    """One response, as an object or as the events that build it."""

    def __init__(
        self, request: web.Request, response: dict[str, Any], generations: Sequence[Generation], reader: MessageReader
    ) -> None:
        self._request = request
        self._response = response
        self._generations = generations
        self._reader = reader
        self._items = ResponseItems()
        self._num_events = 0

    async def whole(self) -> web.Response:
        text, reason = "", None
        async with contextlib.aclosing(merge(self._generations)) as deltas:
            async for _, delta in deltas:
                text += text_of(delta.pieces)
                reason = delta.finish_reason
        self._items.take(self._reader.delta(text, is_last=True))
        self._items.end(_status(reason))
        return json_response(self._ended(reason))

    async def stream(self) -> web.StreamResponse:
        async with contextlib.aclosing(merge(self._generations)) as deltas:
            events, first = await open_events(self._request, deltas)
            try:
                begun = {**self._response, "status": "in_progress", "output": [], "usage": None}
                await self._send(events, {"type": "response.created", "response": begun})
                await self._send(events, {"type": "response.in_progress", "response": begun})
                _, delta = await first
                while True:
                    is_last = delta.finish_reason is not None
                    await self._send(
                        events, *self._items.take(self._reader.delta(text_of(delta.pieces), is_last=is_last))
                    )
                    if is_last:
                        break
                    _, delta = await anext(deltas)
                await self._send(events, *self._items.end(_status(delta.finish_reason)))
                ended = self._ended(delta.finish_reason)
                await self._send(events, {"type": f"response.{ended['status']}", "response": ended})
            except Refusal as refusal:
                await self._fail(events, refusal)
            except EngineDeadError:
                await self._fail(events, refuse_dead_engine(draining=self._request.app[DOOR].draining))
            return await events.close(b"")

    async def _send(self, events: EventStream, *sent: Event) -> None:
        for event in sent:
            await events.send_named({**event, "sequence_number": self._num_events})
            self._num_events += 1

    async def _fail(self, events: EventStream, refusal: Refusal) -> None:
        self._request.app[DOOR].count_refusal(self._request[TENANT_ID], refusal.code)
        error = {"code": refusal.code, "message": refusal.message}
        failed = {**self._response, "status": "failed", "error": error, "output": self._items.items, "usage": None}
        await self._send(events, {"type": "response.failed", "response": failed})

    def _ended(self, reason: FinishReason | None) -> dict[str, Any]:
        used = usage(self._generations)
        status = _status(reason)
        return {
            **self._response,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items.items,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
        }


def _status(reason: FinishReason | None) -> str:
    return "incomplete" if reason is FinishReason.LENGTH else "completed"
