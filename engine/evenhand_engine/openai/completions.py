"""POST /v1/completions."""

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
from evenhand_engine.openai.logprobs import CompletionLogprobs
from evenhand_engine.openai.prompts import PromptReader
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.sampling import sampling_params
from evenhand_engine.openai.schema import CompletionRequest
from evenhand_engine.openai.stream import answer
from evenhand_engine.scheduler.request import SamplingParams
from evenhand_engine.text.detokenizer import Piece, text_of


@dataclass(frozen=True, slots=True)
class _CompletionFormat:
    completion_id: str
    model: str
    created: int
    echoes: list[str] | None  # of each choice the prompt's text, to be written before the output
    logprobs: list[CompletionLogprobs] | None  # of each choice

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        return None if self.echoes is None else self._choice(index, self.echoes[index], None)

    def choice(
        self, index: int, pieces: Sequence[Piece], finish_reason: str | None, *, streamed: bool
    ) -> dict[str, Any]:
        echo = "" if streamed or self.echoes is None else self.echoes[index]
        logprobs = None if self.logprobs is None else self.logprobs[index].take(pieces)
        return self._choice(index, echo + text_of(pieces), finish_reason, logprobs)

    def _choice(
        self, index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


async def create_completion(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[ENGINE], request[TENANT_ID]
    num_taken = await service.door.check(tenant_id)
    body, prompts, echoes, params = await read_request(request, functools.partial(_read, service))
    num_choices = body.n or 1
    form = _CompletionFormat(
        completion_id=f"cmpl-{body.request_id or request[REQUEST_ID]}",
        model=body.model or service.model_names[0],
        created=int(time.time()),
        echoes=None if echoes is None else [echo for echo in echoes for _ in range(num_choices)],
        logprobs=None
        if body.num_logprobs is None
        else [CompletionLogprobs(service.tokenizer) for _ in range(len(prompts) * num_choices)],
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    async with begin(service, tenant_id, body, prompts, params, max_tokens, num_taken=num_taken) as generations:
        return await answer(request, body, generations, form)


def _read(
    service: EngineService, raw: bytes
) -> "tuple[CompletionRequest, list[array[int]], list[str] | None, SamplingParams]":
    body = parse_body(raw, CompletionRequest)
    service.check_model(body.model)
    if body.echo and body.num_logprobs is not None:
        message = "`logprobs` with `echo` are not supported: those of a prompt are not computed."
        raise Refusal(400, "unsupported_parameter", message, param="logprobs")
    reader = PromptReader(service.tokenizer, service.info.max_model_len)
    prompts = reader.completion(body)
    echoes = reader.echoes(body, prompts) if body.echo else None
    return without_raw(body), prompts, echoes, sampling_params(body, service.tokenizer)
