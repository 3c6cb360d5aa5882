"""POST /v1/chat/completions."""

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
from evenhand_engine.openai.logprobs import chat_logprobs, token_ids_of
from evenhand_engine.openai.logprobs import prompt_logprobs as listed_prompt_logprobs
from evenhand_engine.openai.messages import MessageReader
from evenhand_engine.openai.prompts import PromptReader, max_prompt_tokens
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.reasoning import begins_as_reasoning, check_end, read_reasoning
from evenhand_engine.openai.sampling import check_answerable, sampling_params
from evenhand_engine.openai.schema import ChatCompletionRequest
from evenhand_engine.openai.stream import answer
from evenhand_engine.openai.structure import Structure, check_structure, read_answer, read_structure
from evenhand_engine.openai.tools import Tools, definitions, read_tools, tool_format
from evenhand_engine.scheduler.request import SamplingParams, TokenLogprobs
from evenhand_engine.text.detokenizer import Piece, text_of
from evenhand_engine.text.reasoning import BEGIN, END, ReasoningParser
from evenhand_engine.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _ChatFormat:
    completion_id: str
    model: str
    created: int
    tokenizer: Tokenizer
    body: ChatCompletionRequest
    prompt: "array[int]"
    readers: list[MessageReader]  # of each choice

    @property
    def is_text(self) -> bool:
        has_more = self.body.num_logprobs is not None or self.body.return_token_ids
        return not has_more and all(reader.is_text for reader in self.readers)

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
        self,
        index: int,
        pieces: Sequence[Piece],
        finish_reason: str | None,
        *,
        streamed: bool,
        prompt_logprobs: Sequence[TokenLogprobs] = (),
    ) -> dict[str, Any]:
        text, reader = text_of(pieces), self.readers[index]
        if streamed:
            message = {"delta": reader.delta(text, is_last=finish_reason is not None)}
        else:
            message = {"message": reader.message(text)}
        asked = self.body.num_logprobs is not None
        choice: dict[str, Any] = {"index": index, **message, "finish_reason": reader.finish_reason(finish_reason)}
        as_ids = bool(self.body.return_tokens_as_token_ids)
        choice["logprobs"] = chat_logprobs(self.tokenizer, pieces, as_ids=as_ids) if asked and pieces else None
        if self.body.return_token_ids:
            choice["token_ids"] = token_ids_of(pieces)
        return choice

    def additions(self, prompt_logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        found: dict[str, Any] = {"prompt_token_ids": self.prompt.tolist()} if self.body.return_token_ids else {}
        if (num_top := self.body.prompt_logprobs) is not None:
            listed = listed_prompt_logprobs(self.tokenizer, self.prompt, prompt_logprobs, num_top)
            found["prompt_logprobs"] = listed
        return found


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[ENGINE], request[TENANT_ID]
    num_taken = await enter(request)
    asked = await read_request(request, functools.partial(read_chat, service))
    body, prompt, params = asked.body, asked.prompt, asked.params
    await check_structure(service, tenant_id, asked.structure)
    form = _ChatFormat(
        completion_id=f"chatcmpl-{body.request_id or request[REQUEST_ID]}",
        model=body.model or service.model_names[0],
        created=int(time.time()),
        tokenizer=service.tokenizer,
        body=body,
        prompt=prompt,
        readers=[message_reader(service, asked) for _ in range(body.n or 1)],
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    async with begin(service, tenant_id, body, [prompt], params, max_tokens, num_taken=num_taken) as generations:
        return await answer(request, body, generations, form)


class ReadChat(NamedTuple):
    """What a body of a chat asks of the engine. `starts_inside`: see `begins_as_reasoning`."""

    body: ChatCompletionRequest
    prompt: "array[int]"
    params: SamplingParams
    tools: Tools | None
    structure: Structure | None
    starts_inside: bool


def read_chat(service: EngineService, raw: bytes) -> ReadChat:
    """Raises Refusal. Slow: run by `Service.compute`."""
    body = parse_body(raw, ChatCompletionRequest)
    service.check_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "invalid_value", "`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    check_answerable(body, service.info)
    most, max_tokens = service.info.max_model_len, body.max_completion_tokens or body.max_tokens
    tools = read_tools(body, tool_format(service))
    reader = PromptReader(service.tokenizer, most, max_prompt_tokens(body, most, max_tokens))
    prompt = reader.chat(body, definitions(body, tools))
    answer = read_answer(body) if tools is not None and tools.takes_answer else None
    grammar = None if tools is None else tools.grammar(service.tokenizer, answer)
    structure = read_structure(service, body, of_tools=grammar, answer=answer)
    starts_inside = begins_as_reasoning(service, body)
    reasoning = read_reasoning(service, body, starts_inside=starts_inside, is_structured=structure is not None)
    params = sampling_params(body, service.tokenizer, None if structure is None else structure.grammar, reasoning)
    check_end(reasoning, params)
    markers = () if tools is None else tools.form.markers
    if service.settings.reasoning_parser is not None:
        markers = (*markers, BEGIN, END)
    if any(service.tokenizer.special_id(marker) is not None for marker in markers):
        body = msgspec.structs.replace(body, skip_special_tokens=False)  # or calls and reasoning could not be seen
    return ReadChat(without_raw(body), prompt, params, tools, structure, starts_inside)


def message_reader(service: EngineService, asked: ReadChat) -> MessageReader:
    """Of one choice."""
    is_told = service.settings.reasoning_parser is not None
    reasoning = ReasoningParser(starts_inside=asked.starts_inside) if is_told else None
    return MessageReader(asked.tools, reasoning, shows_reasoning=asked.body.include_reasoning is not False)
