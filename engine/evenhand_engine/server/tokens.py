"""POST /tokenize and POST /detokenize. Each counts as one request of the tenant's quota, since each costs time."""

import time

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.server.chat import render_chat
from evenhand_engine.server.requests import read_body
from evenhand_engine.server.responses import json_response
from evenhand_engine.server.schema import DetokenizeRequest, TokenizeRequest, parse_body
from evenhand_engine.server.service import SERVICE, TENANT_ID


async def tokenize(request: web.Request) -> web.Response:
    service, tenant_id = request.app[SERVICE], request[TENANT_ID]
    service.admission.count_request(tenant_id, time.monotonic())
    body = parse_body(await read_body(request), TokenizeRequest)
    service.check_model(body.model)
    if body.messages:
        token_ids = await render_chat(
            service,
            tenant_id,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=bool(body.add_special_tokens),
            variables=body.chat_template_kwargs or {},
        )
    elif body.prompt is not None:
        token_ids = await service.encode(tenant_id, body.prompt, body.add_special_tokens is not False)
    else:
        raise Refusal(400, "invalid_value", "Either `prompt` or `messages` is needed.", param="prompt")
    answer = {"count": len(token_ids), "max_model_len": service.ready.max_model_len, "tokens": token_ids}
    strings = {"token_strs": [service.tokenizer.token(i) for i in token_ids]} if body.return_token_strs else {}
    return json_response(answer | strings)


async def detokenize(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    service.admission.count_request(request[TENANT_ID], time.monotonic())
    body = parse_body(await read_body(request), DetokenizeRequest)
    service.check_model(body.model)
    if max(body.tokens, default=0) >= service.tokenizer.vocab_size:
        raise Refusal(400, "invalid_value", "A token id is not in the vocabulary.", param="tokens")
    return json_response({"prompt": service.tokenizer.decode(body.tokens, skip_special_tokens=False)})
