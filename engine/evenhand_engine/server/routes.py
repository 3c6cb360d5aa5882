"""Routes: the public port's endpoints, with what each takes and answers."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from evenhand_engine.anthropic.answers import Message, TokenCount
from evenhand_engine.anthropic.api import count_tokens, create_message
from evenhand_engine.anthropic.bodies import CountTokensRequest, MessageRequest
from evenhand_engine.errors import Refusal
from evenhand_engine.openai.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Detokenized,
    Load,
    Model,
    Models,
    Rendered,
    ServerInfo,
    Tokens,
    Version,
)
from evenhand_engine.openai.chat import create_chat_completion
from evenhand_engine.openai.completions import create_completion
from evenhand_engine.openai.render import render_chat_completion, render_completion
from evenhand_engine.openai.response_answers import Response
from evenhand_engine.openai.response_api import create_response
from evenhand_engine.openai.response_bodies import ResponseRequest
from evenhand_engine.openai.schema import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from evenhand_engine.openai.tokens import detokenize, tokenize
from evenhand_engine.server.information import (
    list_models,
    show_health,
    show_load,
    show_metrics,
    show_model,
    show_ready,
    show_server_info,
    show_version,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One endpoint.

    Attributes:
        path: aiohttp's; a parameter is text.
        body: type of what it takes; None: nothing.
        answer: type of what it answers as JSON; str: text; None: an empty body.
        event: type of each event of a stream, where the body may ask for one; str: events of many kinds, as OpenAI's and Anthropic's clients know them.
        query: parameters of the query, with what each may be.
        is_open: anybody may ask, since the answer says nothing of tenants and costs nothing.
    """

    method: str
    path: str
    handler: Handler
    body: Any = None
    answer: Any = None
    event: Any = None
    query: tuple[tuple[str, tuple[str, ...]], ...] = ()
    is_open: bool = False


def _get(path: str, handler: Handler, answer: Any = None, **more: Any) -> Route:
    return Route(method="GET", path=path, handler=handler, answer=answer, **more)


def _post(path: str, handler: Handler, body: Any, answer: Any, event: Any = None) -> Route:
    return Route(method="POST", path=path, handler=handler, body=body, answer=answer, event=event)


ROUTES = (
    _post("/v1/chat/completions", create_chat_completion, ChatCompletionRequest, ChatCompletion, ChatCompletionChunk),
    _post("/v1/chat/completions/render", render_chat_completion, ChatCompletionRequest, Rendered),
    _post("/v1/completions", create_completion, CompletionRequest, Completion, Completion),
    _post("/v1/completions/render", render_completion, CompletionRequest, list[Rendered]),
    _post("/v1/responses", create_response, ResponseRequest, Response, str),
    _post("/v1/messages", create_message, MessageRequest, Message, str),
    _post("/v1/messages/count_tokens", count_tokens, CountTokensRequest, TokenCount),
    _get("/v1/models", list_models, Models),
    _get("/v1/models/{model:.+}", show_model, Model),
    _post("/tokenize", tokenize, TokenizeRequest, Tokens),
    _post("/detokenize", detokenize, DetokenizeRequest, Detokenized),
    _get("/server_info", show_server_info, ServerInfo, query=(("config_format", ("text", "json")),)),
    _get("/load", show_load, Load, is_open=True),
    _get("/health", show_health, is_open=True),
    _get("/ready", show_ready, is_open=True),
    _get("/ping", show_health, is_open=True),
    Route(method="POST", path="/ping", handler=show_health, is_open=True),
    _get("/version", show_version, Version, is_open=True),
    _get("/metrics", show_metrics, str, is_open=True),
)

_OTHER_MODELS = {
    path
    for name in ("embeddings", "score", "rerank", "pooling", "classify")
    for path in (f"/{name}", f"/v1/{name}", f"/v2/{name}")
}


async def wait_to_be_read(request: web.Request) -> None:
    """Of `Expect: 100-continue`: aiohttp would send leave at once, before credential and size are known."""


async def refuse_route(request: web.Request) -> web.StreamResponse:
    """No such route: 404, or 405 where another method is known. Nobody gets leave to send a body for it."""
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        allowed |= (await resource.resolve(request))[1]
    if allowed := allowed - {"*"}:
        raise web.HTTPMethodNotAllowed(request.method, allowed)
    if request.path in _OTHER_MODELS:
        raise Refusal(404, "not_found", f"{request.path} is for models that embed or rank; this one generates text.")
    raise web.HTTPNotFound
