"""POST /v1/completions."""

import functools
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import ENGINE, EngineService
from evenhand_engine.frontend.keys import REQUEST_ID, TENANT_ID
from evenhand_engine.frontend.requests import enter
from evenhand_engine.openai.bodies import parse_body, without_raw
from evenhand_engine.openai.generation import begin
from evenhand_engine.openai.logprobs import CompletionLogprobs, token_ids_of
from evenhand_engine.openai.logprobs import prompt_logprobs as listed_prompt_logprobs
from evenhand_engine.openai.prompts import PromptReader, max_prompt_tokens
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.sampling import check_answerable, sampling_params
from evenhand_engine.openai.schema import CompletionRequest
from evenhand_engine.openai.stream import answer
from evenhand_engine.openai.structure import Structure, check_structure, read_structure
from evenhand_engine.scheduler.request import SamplingParams, TokenLogprobs
from evenhand_engine.text.detokenizer import Piece, text_of
from evenhand_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _CompletionFormat:
    completion_id: str
    model: str
    created: int
    tokenizer: Tokenizer
    body: CompletionRequest
    prompts: "list[array[int]]"
    echoes: list[str] | None  # of each prompt its text, to be written before the output
    logprobs: list[CompletionLogprobs] | None  # of each choice

    @property
    def is_text(self) -> bool:
        return self.logprobs is None and not self.body.return_token_ids

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        if self.echoes is None and not self.body.return_token_ids:
            return None
        choice = {"index": index, "text": self._echo(index), "logprobs": None, "finish_reason": None}
        return choice | self._prompt_ids(index)

    def choice(
        self,
        index: int,
        pieces: Sequence[Piece],
        finish_reason: str | None,
        *,
        streamed: bool,
        prompt_logprobs: Sequence[TokenLogprobs] = (),
    ) -> dict[str, Any]:
        text = text_of(pieces)
        choice: dict[str, Any] = {
            "index": index,
            "text": text if streamed else self._echo(index) + text,
            "logprobs": self._logprobs(index, pieces, prompt_logprobs),
            "finish_reason": finish_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = token_ids_of(pieces)
            choice |= {} if streamed else self._prompt_ids(index)
        if (num_top := self.body.prompt_logprobs) is not None:
            prompt = self._prompt(index)
            choice["prompt_logprobs"] = listed_prompt_logprobs(self.tokenizer, prompt, prompt_logprobs, num_top)
        return choice

    def additions(self, prompt_logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {}

    def _logprobs(
        self, index: int, pieces: Sequence[Piece], of_prompt: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        if self.echoes is None:
            return self.logprobs[index].take(pieces)
        prompt = self.logprobs[index].take_prompt(self._prompt(index), of_prompt)
        output = self.logprobs[index].take(pieces)
        return {name: values + output[name] for name, values in prompt.items()}

    def _echo(self, index: int) -> str:
        return "" if self.echoes is None else self.echoes[self._prompt_index(index)]

    def _prompt(self, index: int) -> "array[int]":
        return self.prompts[self._prompt_index(index)]

    def _prompt_index(self, index: int) -> int:
        return index // (self.body.n or 1)

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt(index).tolist()} if self.body.return_token_ids else {}


async def create_completion(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[ENGINE], request[TENANT_ID]
    num_taken = await enter(request)
    body, prompts, echoes, params, structure = await read_request(request, functools.partial(read_completion, service))
    await check_structure(service, tenant_id, structure)
    num_choices = body.n or 1
    form = _CompletionFormat(
        completion_id=f"cmpl-{body.request_id or request[REQUEST_ID]}",
        model=body.model or service.model_names[0],
        created=int(time.time()),
        tokenizer=service.tokenizer,
        body=body,
        prompts=prompts,
        echoes=echoes,
        logprobs=None
        if not body.tells_logprobs
        else [
            CompletionLogprobs(service.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
            for _ in range(len(prompts) * num_choices)
        ],
    )
    async with begin(service, tenant_id, body, prompts, params, body.limit, num_taken=num_taken) as generations:
        return await answer(request, body, generations, form)


class ReadCompletion(NamedTuple):
    """What a body asks of the engine."""

    body: CompletionRequest
    prompts: "list[array[int]]"
    echoes: list[str] | None
    params: SamplingParams
    structure: Structure | None


def read_completion(service: EngineService, raw: bytes) -> ReadCompletion:
    """Raises Refusal. Slow: run by `Service.compute`."""
    body = parse_body(raw, CompletionRequest)
    service.check_model(body.model)
    check_answerable(body, service.info)
    if body.echo and body.tells_logprobs and body.stream:
        message = "`logprobs` with `echo` cannot be streamed."
        raise Refusal(400, "invalid_value", message, param="logprobs")
    if body.limit == 0 and not body.echo:
        message = "`max_tokens` is at least 1, or 0 for an `echo` alone."
        raise Refusal(400, "invalid_value", message, param="max_tokens")
    if 1 < (body.best_of or 1) < (body.n or 1):
        raise Refusal(400, "invalid_value", "`best_of` is at least `n`.", param="best_of")
    most = service.info.max_model_len
    reader = PromptReader(service.tokenizer, most, max_prompt_tokens(body, most, body.limit))
    suffix = reader.suffix(body)
    prompts = reader.completion(body, suffix)
    echoes = reader.echoes(body, prompts) if body.echo else None
    structure = read_structure(service, body)
    params = sampling_params(body, service.tokenizer, None if structure is None else structure.grammar)
    if suffix is not None and not body.ignore_eos and (form := service.tokenizer.fill_in_middle):
        params = msgspec.structs.replace(params, stop_token_ids=params.stop_token_ids | form.stop_token_ids)
    return ReadCompletion(without_raw(body), prompts, echoes, params, structure)
