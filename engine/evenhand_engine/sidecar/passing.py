"""Passing: one client's request on its way to the upstream, by way of identity, quota and the dispatcher's queue."""

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.keys import TENANT_ID
from evenhand_engine.frontend.requests import enter, read_pieces, read_start, stream_body
from evenhand_engine.sidecar.body import Body, is_json_object
from evenhand_engine.sidecar.exchange import exchange, target_of
from evenhand_engine.sidecar.front import FRONT, is_management
from evenhand_engine.sidecar.intake import Intake
from evenhand_engine.sidecar.passage import Passage

_TOKENIZER_PATHS = {"/tokenize", "/detokenize", "/apply-template", "/v1/tokenize", "/v1/detokenize"}


async def pass_on(request: web.Request) -> web.StreamResponse:
    """Any path, known or not. What computes waits for its turn; the rest costs the tenant a request of its quota."""
    front, tenant_id = request.app[FRONT], request[TENANT_ID]
    _check_target(request)
    if is_management(request.path):
        raise Refusal(403, "management_path", "This path changes the engine for all tenants, and is not passed on.")
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return await exchange(request, None, None)
    if request.path in _TOKENIZER_PATHS:
        await enter(request, generates=False)
        return await exchange(request, [piece async for piece in read_pieces(request)], None)
    num_taken = await enter(request)
    start, is_json = b"", request.content_type.endswith("json") or request.content_length == 0
    if not is_json and "Content-Encoding" not in request.headers:
        start = await read_start(request)
        is_json = is_json_object(start)
    if is_json or request.content_length is None:
        body = await _read(request, start, says_json=is_json)
        passage = Passage(front, request, body, body.size, num_taken)
        limits = front.tickets.tenant(tenant_id).limits
        is_limited = limits.max_prompt_tokens is not None or limits.tokens_per_minute is not None
        passage.num_prompt_tokens = await front.prompts.count(tenant_id, body, is_limited=is_limited)
    else:  # such as audio: streamed, and sized by what its header says
        passage = Passage(front, request, None, request.content_length or 0, num_taken)
    async with passage:
        await passage.turn()
        if passage.body is None:
            return await exchange(request, stream_body(request, start), passage)
        passage.prepare(passage.body)
        pieces = await front.compute(tenant_id, passage.body.num_bytes, passage.body.encode)
        return await exchange(request, pieces, passage)


def _check_target(request: web.Request) -> None:
    """Raises Refusal for what is no request of a resource, or of which one server would make another resource than the next."""
    if request.method == "TRACE":  # it would be answered with the upstream's key
        raise Refusal(405, "method_not_allowed", "TRACE is not passed on.")
    if not target_of(request).startswith("/"):
        raise Refusal(400, "invalid_value", "The request's target must be a path.")
    if not {".", ".."}.isdisjoint(request.path.split("/")):
        raise Refusal(400, "invalid_value", "The request's path must have no part `.` or `..`.")
    if "websocket" in ",".join(request.headers.getall("Upgrade", [])).lower():  # other offers need not be taken
        raise Refusal(501, "unsupported", "WebSockets are not passed on.")


async def _read(request: web.Request, start: bytes, *, says_json: bool) -> Body:
    """The body, looked at as it comes, so that none holds the event loop."""
    intake = Intake(says_json=says_json)
    async for piece in read_pieces(request, start):
        intake.take(piece)
    return await request.app[FRONT].compute(request[TENANT_ID], intake.num_bytes, intake.body)
