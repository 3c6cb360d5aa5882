"""POST /v1/responses: OpenAI's newer form of a chat. Stateless: every request brings its whole conversation."""

import functools
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from evenhand_engine.backends.backend import Delta
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import ENGINE, EngineService
from evenhand_engine.frontend.keys import REQUEST_ID
from evenhand_engine.frontend.requests import enter
from evenhand_engine.openai.bodies import parse_body
from evenhand_engine.openai.chat import ReadChat, read_chat
from evenhand_engine.openai.events import Event
from evenhand_engine.openai.generation import Generation
from evenhand_engine.openai.message_answer import answer_message
from evenhand_engine.openai.messages import MessageReader
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.response_bodies import PARAMS, ResponseRequest, as_chat, echoed
from evenhand_engine.openai.response_items import ResponseItems
from evenhand_engine.openai.stream import usage
from evenhand_engine.scheduler.request import FinishReason


async def create_response(request: web.Request) -> web.StreamResponse:
    service = request.app[ENGINE]
    num_taken = await enter(request)
    asked, fields, is_streamed = await read_request(request, functools.partial(_read, service))
    response = {
        "id": f"resp_{request[REQUEST_ID]}",
        "object": "response",
        "created_at": int(time.time()),
        "model": asked.body.model or service.model_names[0],
        "error": None,
        "incomplete_details": None,
        **fields,
    }
    make_form = functools.partial(_ResponseForm, response)
    try:
        return await answer_message(request, asked, make_form, num_taken=num_taken, is_streamed=is_streamed)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


def _read(service: EngineService, raw: bytes) -> tuple[ReadChat, dict[str, Any], bool]:
    body = parse_body(raw, ResponseRequest)
    try:
        return read_chat(service, as_chat(body)), echoed(body), bool(body.stream)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


class _ResponseForm:
    """One response."""

    def __init__(self, response: dict[str, Any], generations: Sequence[Generation], _: MessageReader) -> None:
        self._response = response
        self._generations = generations
        self._items = ResponseItems()
        self._num_events = 0

    def opening(self) -> list[Event]:
        begun = {**self._response, "status": "in_progress", "output": [], "usage": None}
        return self._numbered(
            {"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun}
        )

    def begin(self) -> list[Event]:
        return []

    def take(self, delta: dict[str, Any]) -> list[Event]:
        return self._numbered(*self._items.take(delta))

    def end(self, last: Delta) -> list[Event]:
        events = self._items.end(_status(last.finish_reason))
        ended = self._ended(last.finish_reason)
        return self._numbered(*events, {"type": f"response.{ended['status']}", "response": ended})

    def fail(self, refusal: Refusal) -> Event:
        error = {"code": refusal.code, "message": refusal.message}
        failed = {**self._response, "status": "failed", "error": error, "output": self._items.items, "usage": None}
        (event,) = self._numbered({"type": "response.failed", "response": failed})
        return event

    def whole(self, last: Delta) -> dict[str, Any]:
        self._items.end(_status(last.finish_reason))
        return self._ended(last.finish_reason)

    def _numbered(self, *events: Event) -> list[Event]:
        first, self._num_events = self._num_events, self._num_events + len(events)
        return [{**event, "sequence_number": number} for number, event in enumerate(events, first)]

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
