"""POST /v1/chat/completions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from evenhand_engine.frontend.requests import read_body
from evenhand_engine.frontend.service import REQUEST_ID, SERVICE, TENANT_ID
from evenhand_engine.openai.generation import begin
from evenhand_engine.openai.prompts import chat_token_ids
from evenhand_engine.openai.schema import ChatCompletionRequest, parse_body
from evenhand_engine.openai.stream import answer
from evenhand_engine.text.detokenizer import Piece, text_of


@dataclass(frozen=True, slots=True)
class _ChatFormat:
    completion_id: str
    model: str
    created: int

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": "chat.completion.chunk" if streamed else "chat.completion",
            "created": self.created,
            "model": self.model,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(
        self, index: int, pieces: Sequence[Piece], finish_reason: str | None, *, streamed: bool
    ) -> dict[str, Any]:
        text = text_of(pieces)
        if streamed:
            message = {"delta": {"content": text} if text else {}}
        else:
            message = {"message": {"role": "assistant", "content": text}}
        return {"index": index, **message, "logprobs": None, "finish_reason": finish_reason}


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[SERVICE], request[TENANT_ID]
    service.admission.check(tenant_id, 1, time.monotonic())
    raw = await read_body(request)
    body = parse_body(raw, ChatCompletionRequest)
    service.check_model(body.model)
    variables = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    prompt = await service.compute(tenant_id, len(raw), lambda: chat_token_ids(service.tokenizer, body, variables))
    form = _ChatFormat(
        completion_id=f"chatcmpl-{request[REQUEST_ID]}",
        model=body.model or service.model_names[0],
        created=int(time.time()),
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    with begin(service, tenant_id, body, [prompt], max_tokens) as generations:
        return await answer(request, body, generations, form)
