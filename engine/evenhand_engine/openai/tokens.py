"""POST /tokenize and POST /detokenize. Each counts as one request of the tenant's quota, since each costs time."""

import functools
from array import array

import msgspec
from aiohttp import web
from msgspec import UNSET

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.engine_service import ENGINE, EngineService
from evenhand_engine.frontend.requests import enter
from evenhand_engine.openai.answers import Detokenized, Tokens
from evenhand_engine.openai.bodies import given, parse_body, token_ids
from evenhand_engine.openai.prompts import PromptReader, check_token_ids
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.schema import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from evenhand_engine.openai.tools import definitions, read_tools, tool_format

_MAX_TOKENS = 2**17  # or the model's context, if that is more: each may be a text of hundreds of bytes


async def tokenize(request: web.Request) -> web.Response:
    service = request.app[ENGINE]
    await enter(request, generates=False)
    (answer,) = await read_request(request, functools.partial(_tokenize, service))
    return web.Response(body=answer, content_type="application/json")


def _tokenize(service: EngineService, raw: bytes) -> tuple[bytes]:
    """The whole answer as JSON: it may be much larger than the body."""
    body = parse_body(raw, TokenizeRequest)
    service.check_model(body.model)
    limit = max(service.info.max_model_len, _MAX_TOKENS)
    reader = PromptReader(service.tokenizer, limit)
    try:
        found = _read(service, body, reader)
    except Refusal as refusal:
        if refusal.code != "context_length_exceeded":
            raise
        message = f"Here a text is tokenized up to {limit} tokens."
        param = "prompt" if given(body.messages) is None else "messages"
        raise Refusal(400, refusal.code, message, param=param) from refusal
    strings = [service.tokenizer.token(i) for i in found] if body.return_token_strs else UNSET
    most = service.info.max_model_len
    return (
        msgspec.json.encode(Tokens(count=len(found), max_model_len=most, tokens=found.tolist(), token_strs=strings)),
    )


def _read(service: EngineService, body: TokenizeRequest, reader: PromptReader) -> "array[int]":
    if given(body.messages) is not None:
        offered = ChatCompletionRequest(messages=body.messages, tools=body.tools)
        return reader.chat(body, definitions(offered, read_tools(offered, tool_format(service))))
    if body.prompt is None:
        raise Refusal(400, "invalid_value", "Either `prompt` or `messages` is needed.", param="prompt")
    return reader.text(body.prompt, "prompt", add_special_tokens=body.add_special_tokens is not False)


async def detokenize(request: web.Request) -> web.Response:
    service = request.app[ENGINE]
    await enter(request, generates=False)
    (answer,) = await read_request(request, functools.partial(_detokenize, service))
    return web.Response(body=answer, content_type="application/json")


def _detokenize(service: EngineService, raw: bytes) -> tuple[bytes]:
    body = parse_body(raw, DetokenizeRequest)
    service.check_model(body.model)
    if (tokens := given(body.tokens)) is None:
        raise Refusal(400, "invalid_value", "`tokens` is missing.", param="tokens")
    limit = max(service.info.max_model_len, _MAX_TOKENS)
    if bytes(tokens).count(b",") >= limit:
        message = f"`tokens` holds more than {limit} token ids."
        raise Refusal(400, "invalid_value", message, param="tokens")
    found = token_ids(tokens, "tokens")
    check_token_ids(service.tokenizer, found, "tokens")
    return (msgspec.json.encode(Detokenized(service.tokenizer.decode(found, skip_special_tokens=False))),)
