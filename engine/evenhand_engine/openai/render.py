"""POST /v1/chat/completions/render and /v1/completions/render: what a request would be computed from. Nothing is computed.

Each counts as one request of the tenant's quota, since each costs time.
"""

import functools
from collections.abc import Sequence

from aiohttp import web

from evenhand_engine.frontend.engine_service import ENGINE
from evenhand_engine.frontend.keys import REQUEST_ID
from evenhand_engine.frontend.requests import enter
from evenhand_engine.openai.answers import Rendered, RenderedSampling
from evenhand_engine.openai.chat import read_chat
from evenhand_engine.openai.completions import read_completion
from evenhand_engine.openai.reading import read_request
from evenhand_engine.openai.responses import json_response
from evenhand_engine.openai.schema import SamplingFields
from evenhand_engine.scheduler.request import SamplingParams


async def render_chat_completion(request: web.Request) -> web.Response:
    service = request.app[ENGINE]
    await enter(request, generates=False)
    asked = await read_request(request, functools.partial(read_chat, service))
    max_tokens = asked.body.max_completion_tokens or asked.body.max_tokens
    return json_response(_rendered(request, "chatcmpl", asked.body, asked.prompt, asked.params, max_tokens))


async def render_completion(request: web.Request) -> web.Response:
    """A list, of each prompt."""
    service = request.app[ENGINE]
    await enter(request, generates=False)
    asked = await read_request(request, functools.partial(read_completion, service))
    body = asked.body
    return json_response(
        [_rendered(request, "cmpl", body, prompt, asked.params, body.limit) for prompt in asked.prompts]
    )


def _rendered(
    request: web.Request,
    kind: str,
    body: SamplingFields,
    prompt: Sequence[int],
    params: SamplingParams,
    max_tokens: int | None,
) -> Rendered:
    sampling = RenderedSampling(
        n=body.n or 1,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=body.seed,
        stop=list(body.stop_strings),
        stop_token_ids=sorted(params.stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=params.min_tokens,
        max_tokens=max_tokens,
        logprobs=params.num_logprobs,
        prompt_logprobs=params.num_prompt_logprobs,
        logit_bias={str(token_id): value for token_id, value in params.logit_bias},
        allowed_token_ids=None if params.allowed_token_ids is None else sorted(params.allowed_token_ids),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        thinking_token_budget=None if params.reasoning is None else params.reasoning.budget,
    )
    return Rendered(
        request_id=f"{kind}-{body.request_id or request[REQUEST_ID]}",
        model=body.model or request.app[ENGINE].model_names[0],
        token_ids=list(prompt),
        sampling_params=sampling,
        stream=bool(body.stream),
        priority=body.priority,
    )
