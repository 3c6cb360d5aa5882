"""POST /v1/messages and /v1/messages/count_tokens."""

import functools
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from evenhand_engine.anthropic.answers import TokenCount
from evenhand_engine.anthropic.blocks import Blocks
from evenhand_engine.anthropic.bodies import PARAMS, CountTokensRequest, MessageRequest, as_chat
from evenhand_engine.backends.backend import Delta
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import ENGINE, EngineService
from evenhand_engine.frontend.keys import REQUEST_ID
from evenhand_engine.frontend.requests import enter
from evenhand_engine.openai.bodies import parse_body
from evenhand_engine.openai.chat import ReadChat, read_chat
from evenhand_engine.openai.errors import error_body
from evenhand_engine.openai.events import Event
from evenhand_engine.openai.generation import Generation
from evenhand_engine.openai.message_answer import answer_message
from evenhand_engine.openai.messages import MessageReader
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.stream import usage
from evenhand_engine.scheduler.request import FinishReason


async def create_message(request: web.Request) -> web.StreamResponse:
    service = request.app[ENGINE]
    num_taken = await enter(request)
    asked, is_streamed = await read_request(request, functools.partial(_read, service, MessageRequest))
    message = {
        "id": f"msg_{request[REQUEST_ID]}",
        "type": "message",
        "role": "assistant",
        "model": asked.body.model or service.model_names[0],
    }
    try:
        make_form = functools.partial(_MessageForm, message)
        return await answer_message(request, asked, make_form, num_taken=num_taken, is_streamed=is_streamed)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


async def count_tokens(request: web.Request) -> web.Response:
    service = request.app[ENGINE]
    await enter(request, generates=False)
    asked, _ = await read_request(request, functools.partial(_read, service, CountTokensRequest))
    return json_response(TokenCount(len(asked.prompt)))


def _read(service: EngineService, kind: type[CountTokensRequest], raw: bytes) -> tuple[ReadChat, bool]:
    body = parse_body(raw, kind)
    try:
        chat = as_chat(body, tells_reasoning=service.settings.reasoning_parser is not None)
        return read_chat(service, chat), bool(body.stream)
    except Refusal as refusal:
        raise refusal.renamed(PARAMS) from refusal


class _MessageForm:
    """One message."""

    def __init__(self, message: dict[str, Any], generations: Sequence[Generation], reader: MessageReader) -> None:
        self._message = message
        self._generations = generations
        self._reader = reader
        self._blocks = Blocks()

    def opening(self) -> list[Event]:
        return []  # what a prefix hit spared is known once it runs

    def begin(self) -> list[Event]:
        begun = {**self._message, "content": [], "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": {**begun, "usage": self._usage()}}]

    def take(self, delta: dict[str, Any]) -> list[Event]:
        return self._blocks.take(delta)

    def end(self, last: Delta) -> list[Event]:
        delta = {"type": "message_delta", "delta": self._stop(last), "usage": self._usage()}
        return [*self._blocks.end(), delta, {"type": "message_stop"}]

    def fail(self, refusal: Refusal) -> Event:
        return {"type": "error", **error_body(refusal)}

    def whole(self, last: Delta) -> dict[str, Any]:
        return {**self._message, "content": self._blocks.content(), **self._stop(last), "usage": self._usage()}

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
