"""POST /v1/chat/completions."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.server.generation import begin
from evenhand_engine.server.requests import read_body
from evenhand_engine.server.schema import ChatCompletionRequest, ChatMessage, parse_body
from evenhand_engine.server.service import REQUEST_ID, SERVICE, TENANT_ID, Service
from evenhand_engine.server.stream import answer
from evenhand_engine.tokenizer import ChatTemplateError


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

    def choice(self, index: int, text: str, finish_reason: str | None, *, streamed: bool) -> dict[str, Any]:
        if streamed:
            message = {"delta": {"content": text} if text else {}}
        else:
            message = {"message": {"role": "assistant", "content": text}}
        return {"index": index, **message, "logprobs": None, "finish_reason": finish_reason}


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    service, tenant_id = request.app[SERVICE], request[TENANT_ID]
    service.admission.check(tenant_id, 1, time.monotonic())
    body = parse_body(await read_body(request), ChatCompletionRequest)
    service.check_model(body.model)
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    prompt = await render_chat(
        service,
        tenant_id,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        variables=variables,
    )
    form = _ChatFormat(
        completion_id=f"chatcmpl-{request[REQUEST_ID]}",
        model=body.model or service.model_names[0],
        created=int(time.time()),
    )
    max_tokens = body.max_completion_tokens or body.max_tokens
    with begin(service, tenant_id, body, [prompt], max_tokens) as generations:
        return await answer(request, body, generations, form)


async def render_chat(
    service: Service,
    tenant_id: str,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    add_special_tokens: bool,
    variables: Mapping[str, Any],
) -> list[int]:
    """Token ids of a conversation; raises Refusal 400 if the chat template does not accept it.

    `add_special_tokens` is off by default, since templates write the special tokens themselves.
    """
    if add_generation_prompt and continue_final_message:
        message = "`add_generation_prompt` and `continue_final_message` exclude each other."
        raise Refusal(400, "invalid_value", message, param="continue_final_message")
    if reserved := variables.keys() & {"messages", "add_generation_prompt"}:
        message = f"`chat_template_kwargs` must not set {', '.join(sorted(reserved))}."
        raise Refusal(400, "invalid_value", message, param="chat_template_kwargs")
    dicts = [message.for_template() for message in messages]

    def compute() -> list[int]:
        text = service.tokenizer.render_chat(
            dicts,
            add_generation_prompt=add_generation_prompt is not False and not continue_final_message,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        return service.tokenizer.encode(text, add_special_tokens)

    try:
        return await service.compute(tenant_id, sum(len(message["content"]) for message in dicts), compute)
    except ChatTemplateError as error:
        message = f"The chat template refuses the messages: {error}"
        raise Refusal(400, "invalid_value", message, param="messages") from error
