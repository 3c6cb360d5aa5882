"""POST /tokenize and POST /detokenize. Each counts as one request of the tenant's quota, since each costs time."""

import time
from typing import Any

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.requests import read_body
from evenhand_engine.frontend.service import SERVICE, TENANT_ID
from evenhand_engine.openai.prompts import chat_token_ids, check_token_ids
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.schema import DetokenizeRequest, TokenizeRequest, parse_body
from evenhand_engine.text.tokenizer import Tokenizer


async def tokenize(request: web.Request) -> web.Response:
    service, tenant_id = request.app[SERVICE], request[TENANT_ID]
    service.admission.count_request(tenant_id, time.monotonic())
    raw = await read_body(request)
    body = parse_body(raw, TokenizeRequest)
    service.check_model(body.model)
    answer = await service.compute(tenant_id, len(raw), lambda: _tokens(service.tokenizer, body))
    return json_response({"max_model_len": service.info.max_model_len} | answer)


def _tokens(tokenizer: Tokenizer, body: TokenizeRequest) -> dict[str, Any]:
    token_ids = _token_ids(tokenizer, body)
    strings = {"token_strs": [tokenizer.token(i) for i in token_ids]} if body.return_token_strs else {}
    return {"count": len(token_ids), "tokens": token_ids} | strings


def _token_ids(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return chat_token_ids(tokenizer, body).tolist()
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, body.add_special_tokens is not False)
    raise Refusal(400, "invalid_value", "Either `prompt` or `messages` is needed.", param="prompt")


async def detokenize(request: web.Request) -> web.Response:
    service, tenant_id = request.app[SERVICE], request[TENANT_ID]
    service.admission.count_request(tenant_id, time.monotonic())
    raw = await read_body(request)
    body = parse_body(raw, DetokenizeRequest)
    service.check_model(body.model)
    check_token_ids(service.tokenizer, body.tokens, "tokens")
    decode = service.tokenizer.decode
    text = await service.compute(tenant_id, len(raw), lambda: decode(body.tokens, skip_special_tokens=False))
    return json_response({"prompt": text})
