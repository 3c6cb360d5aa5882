"""POST /v1/chat/completions."""

import functools
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.service import ENGINE, REQUEST_ID, TENANT_ID, EngineService
from evenhand_engine.openai.bodies import parse_body, without_raw
from evenhand_engine.openai.generation import begin
from evenhand_engine.openai.logprobs import chat_logprobs
from evenhand_engine.openai.prompts import PromptReader
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.sampling import sampling_params
from evenhand_engine.openai.schema import ChatCompletionRequest
from evenhand_engine.openai.stream import answer
from evenhand_engine.scheduler.request import SamplingParams
from evenhand_engine.text.detokenizer import Piece, text_of
from evenhand_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _ChatFormat:
    completion_id: str
    model: str
    created: int
    tokenizer: Tokenizer | None  # where log probabilities are asked for

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
        logprobs = chat_logprobs(self.tokenizer, pieces) if self.tokenizer and pieces else None
        return {"index": index, **message, "logprobs": logprobs, "finish_reason": finish_reason}


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[ENGINE], request[TENANT_ID]
    num_taken = await service.door.check(tenant_id)
    body, prompt, params = await read_request(request, functools.partial(_read, service))
    form = _ChatFormat(
        completion_id=f"chatcmpl-{body.request_id or request[REQUEST_ID]}",
        model=body.model or service.model_names[0],
        created=int(time.time()),
        tokenizer=None if body.num_logprobs is None else service.tokenizer,
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    async with begin(service, tenant_id, body, [prompt], params, max_tokens, num_taken=num_taken) as generations:
        return await answer(request, body, generations, form)


def _read(service: EngineService, raw: bytes) -> "tuple[ChatCompletionRequest, array[int], SamplingParams]":
    body = parse_body(raw, ChatCompletionRequest)
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "invalid_value", "`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    prompt = PromptReader(service.tokenizer, service.info.max_model_len).chat(body)
    return without_raw(body), prompt, sampling_params(body, service.tokenizer)
