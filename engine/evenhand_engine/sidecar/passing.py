"""Passing: one client's request to the upstream and its answer back, by way of identity, quota and the dispatcher's queue.

Joins what must end exactly once whatever happens: the quota reservation, the turn at the dispatcher, the upstream's response
and the metrics. What the upstream answers goes on as it is, errors too; what it fails to answer becomes an OpenAI error,
or, where the answer has begun, an end of the stream that says why.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict

from evenhand_engine.backends.upstream import Upstream
from evenhand_engine.dispatch.dispatcher import Errand
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost, Reservation
from evenhand_engine.frontend.metrics import RequestMetrics
from evenhand_engine.frontend.requests import read_body
from evenhand_engine.frontend.service import LOG_FIELDS, REQUEST_ID, SERVICE, TENANT_ID, WRITES
from evenhand_engine.openai.errors import error_body, refuse_draining, refuse_finished
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.sidecar.body import Body
from evenhand_engine.sidecar.events import EventReader, Usage, usage_of
from evenhand_engine.sidecar.relay import EventWriter, Relay
from evenhand_engine.sidecar.service import SIDECAR, SidecarService

_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}
_OURS = {"host", "authorization", "content-length", "accept-encoding", "expect", "x-request-id"}
_ANSWERED_BY_US = {"server", "date", "x-request-id"}
_OPENAI_STREAMS = ("/v1/completions", "/v1/chat/completions")
_TOKENIZER_PATHS = {"/tokenize", "/detokenize", "/apply-template", "/v1/tokenize", "/v1/detokenize"}
_MAX_HELD_ANSWER = 8 * 2**20  # of an answer that is checked as a whole before it goes on
_RETRY_SECONDS = 0.1


async def pass_on(request: web.Request) -> web.StreamResponse:
    """Any path, known or not. What computes waits for its turn; the rest costs the tenant a request of its quota."""
    service, tenant_id = request.app[SIDECAR], request[TENANT_ID]
    if not request.raw_path.startswith("/"):
        raise Refusal(400, "invalid_value", "The request's target must be a path.")
    if "upgrade" in request.headers.get("Connection", "").lower():
        raise Refusal(
            501, "unsupported", "Connections that change their protocol, such as WebSockets, are not passed on."
        )
    if service.is_management(request.path):
        raise Refusal(403, "management_path", "This path changes the engine for all tenants, and is not passed on.")
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return await _exchange(request, None, None)
    if request.path in _TOKENIZER_PATHS:
        service.admission.count_request(tenant_id, time.monotonic())
        return await _exchange(request, await read_body(request), None)
    num_taken = service.admission.check(tenant_id, time.monotonic())
    if request.content_type == "application/json" or request.content_length in (None, 0):
        body = Body(await read_body(request))
        passage = Passage(service, request, body, len(body.raw), num_taken)
        limits = service.admission.account(tenant_id).config.limits
        is_limited = limits.max_prompt_tokens is not None or limits.tokens_per_minute is not None
        passage.num_prompt_tokens = await service.prompts.count(tenant_id, body, is_limited=is_limited)
    else:  # such as audio: streamed, and sized by what its header says
        passage = Passage(service, request, None, request.content_length or 0, num_taken)
    with passage:
        async with service.upstream.turn(passage.errand) as reason:
            if reason is not None:
                raise passage.refused(reason)
            passage.start()
            if passage.body is None:
                return await _exchange(request, request.content.iter_any(), passage)
            return await _exchange(request, passage.prepare(), passage)


class Passage:
    """One request that computes: a context that settles quota and metrics when it is left.

    Args:
        body: None: it is streamed, and not looked at.
        num_bytes: size of the body.
        num_taken: requests of the quota that it has taken already.
    """

    def __init__(
        self, service: SidecarService, request: web.Request, body: Body | None, num_bytes: int, num_taken: int
    ) -> None:
        self._num_taken = num_taken
        self.service = service
        self.body = body
        self.tenant_id: str = request[TENANT_ID]
        self.request_id: str = request[REQUEST_ID]
        self.is_stream = body is not None and body.is_stream
        self.path = request.path
        self.num_bytes = num_bytes
        self.num_prompt_tokens = service.prompts.bytes_per_token.estimate(self.tenant_id, num_bytes)
        self.hides_usage = False
        self.outcome = ("failed", "upstream_error")
        self._log: dict[str, Any] = request[LOG_FIELDS]
        self._reservation: Reservation | None = None
        self._was_computed = True  # the prompt, as far as we know; not if the upstream refused it

    def __enter__(self) -> "Passage":
        service, now = self.service, time.monotonic()
        room = service.info.max_model_len
        self.num_prompt_tokens = min(self.num_prompt_tokens, room - 1)  # what is too long, the upstream refuses
        asked = None if self.body is None else self.body.max_output_tokens
        limit = asked or service.admission.max_output_tokens(self.tenant_id, self.num_prompt_tokens)
        limit = min(limit, room - self.num_prompt_tokens)
        num_choices = 1 if self.body is None else self.body.num_choices
        most = min(limit * num_choices, room - self.num_prompt_tokens)
        expected = None if asked else service.admission.expected_output_tokens(self.tenant_id) * num_choices
        cost = Cost(self.num_prompt_tokens, most, expected)
        (self._reservation,) = service.admission.reserve(self.tenant_id, [cost], now, self._num_taken)
        self.max_output_tokens = limit * num_choices
        self.errand = Errand(
            f"{self.request_id}-{id(self):x}",
            self.tenant_id,
            now,
            num_prompt_tokens=self.num_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            user="" if self.body is None else self.body.user,
            priority=0 if self.body is None else self.body.priority,
            is_silent=not self.is_stream,
        )
        self._metrics = RequestMetrics(
            service.metrics, self.tenant_id, self.num_prompt_tokens, self.max_output_tokens, now
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        now = time.monotonic()
        if kind is not None and issubclass(kind, asyncio.CancelledError | ConnectionResetError):
            self.outcome = ("aborted", "client_gone")
        num_outputs = self.errand.num_charged_outputs
        assert self._reservation is not None
        self._reservation.resize_prompt(self.num_prompt_tokens if self._was_computed else 0)
        self.service.admission.settle(self._reservation, num_outputs, now)
        self._metrics.end(*self.outcome, 0, now)
        self._log |= {"prompt_tokens": self.num_prompt_tokens, "output_tokens": num_outputs}

    def refused(self, reason: FinishReason) -> Refusal:
        """The dispatcher ended it in its queue."""
        refusal = (
            refuse_finished(reason, self.service.admission.queue_delay(self.tenant_id, time.monotonic()))
            or refuse_draining()
        )
        self.outcome = ("refused", refusal.code)
        return refusal

    def start(self) -> None:
        """It leaves the queue."""
        assert self._reservation is not None
        self.service.admission.start(self._reservation)
        self._metrics.start(0, time.monotonic())

    def prepare(self) -> bytes:
        """The body for the upstream: with usage asked for, bounded by the policy, and without a priority of the client's."""
        body = self.body
        assert body is not None
        if body.fields is None:
            return body.raw
        body.set("priority", self.service.upstream_priority(self.tenant_id))
        if (salt := self.service.cache_salt(self.tenant_id)) is not None:
            body.set("cache_salt", salt)
        if self.path in _OPENAI_STREAMS:
            limits = self.service.admission.account(self.tenant_id).config.limits
            is_limited = limits.max_output_tokens is not None or limits.tokens_per_minute is not None
            if body.max_output_tokens is None and is_limited:
                body.set("max_tokens", max(1, self.max_output_tokens // body.num_choices))
            if self.is_stream:
                options = body.value("stream_options")
                options = options if isinstance(options, dict) else {}
                if not options.get("include_usage"):
                    self.hides_usage = True
                    body.set("stream_options", {**options, "include_usage": True})
        return body.encode()

    # -- what the upstream does

    def take_events(self, num_events: int) -> Refusal | None:
        """So many more events of its stream came. Returns why it must end, if the quota leaves no more."""
        if num_events == 0:
            return None
        now, dispatcher = time.monotonic(), self.service.upstream.dispatcher
        is_first = self.errand.num_charged_outputs == 0
        if is_first:
            dispatcher.started(self.errand, now)
        dispatcher.generated(self.errand, num_events)
        self._metrics.take_tokens(num_events, now)
        if is_first:
            self.service.upstream.pump()
        assert self._reservation is not None
        if self.service.admission.generated(self._reservation, num_events, now):
            return None
        message = f"Tenant {self.tenant_id} has used its tokens per minute."
        delay = self.service.admission.queue_delay(self.tenant_id, now)
        return Refusal(429, "tokens_per_minute", message, retry_after=delay)

    def take_usage(self, usage: Usage | None) -> bool:
        """The upstream says what it was; returns whether it is believed, which it is within what is possible."""
        if usage is None or not usage.is_plausible(self.service.info.max_model_len, self.max_output_tokens):
            return False
        dispatcher = self.service.upstream.dispatcher
        if usage.num_prompt_tokens:
            self.num_prompt_tokens = usage.num_prompt_tokens
            self.service.prompts.bytes_per_token.learn(self.tenant_id, self.num_bytes, usage.num_prompt_tokens)
            dispatcher.sized(self.errand, usage.num_prompt_tokens, usage.num_cached_tokens)
        if usage.num_output_tokens is not None:
            if not self.is_stream:
                self._metrics.take_tokens(usage.num_output_tokens, time.monotonic())
            dispatcher.counted(self.errand, usage.num_output_tokens)
        return True

    def take_bytes(self, num_bytes: int) -> None:
        """An answer of that size does not say, or not so that it can be read, how many tokens it has."""
        if self.path in _OPENAI_STREAMS:
            estimate = self.service.prompts.bytes_per_token.estimate(self.tenant_id, num_bytes)
            self.service.upstream.dispatcher.counted(self.errand, min(estimate, self.max_output_tokens))

    def finish(self, status: int) -> None:
        """The answer is complete."""
        if status >= 400:
            self._was_computed = False
            self.service.upstream.dispatcher.sized(self.errand, 0)
            self.outcome = ("failed", "upstream_refused")
        else:
            self.outcome = ("finished", "stop")
            self.service.upstream.dispatcher.end(self.errand)

    def fail(self, refusal: Refusal, *, was_sent: bool) -> None:
        """There will be no answer, or no more of it. What was not sent was not computed."""
        self.outcome = ("failed", refusal.code)
        if not was_sent:
            self._was_computed = False
            self.service.upstream.dispatcher.sized(self.errand, 0)


async def _exchange(
    request: web.Request, body: bytes | AsyncIterator[bytes] | None, passage: Passage | None
) -> web.StreamResponse:
    """Send the request and hand its answer on."""
    upstream = request.app[SIDECAR].upstream
    response = None
    try:
        response = await _send(upstream, request, body)
        if passage is None or response.status >= 400:
            return await _pass_whole(request, response, passage)
        if response.content_type == "text/event-stream" and "Content-Encoding" not in response.headers:
            return await _pass_events(request, response, passage)
        if response.content_type.endswith("json") and "Content-Encoding" not in response.headers:
            return await _pass_json(request, response, passage)
        if request.path.startswith("/v1/") and response.content_type == "text/html":
            raise _upstream_error(f"it answered {response.content_type} instead of JSON")
        return await _pass_whole(request, response, passage)
    except Refusal as refusal:
        if passage is not None:
            passage.fail(refusal, was_sent=refusal.code != "upstream_unavailable")
        raise
    finally:
        if response is not None:
            response.close()  # at once, also where the client has left: that cancels it upstream


async def _send(
    upstream: Upstream, request: web.Request, body: bytes | AsyncIterator[bytes] | None
) -> aiohttp.ClientResponse:
    """The upstream's answer, as far as its headers. A connection that cannot be made is tried again; nothing else is."""
    is_decoded = isinstance(body, bytes | None)  # what is streamed goes on in the encoding in which it came
    headers = _forwarded(request.headers, _OURS | {"content-encoding"} if is_decoded else _OURS)
    headers["X-Request-Id"] = request[REQUEST_ID]
    headers["Accept-Encoding"] = "identity"
    headers.update(upstream.authorization)
    deadline = time.monotonic() + upstream.settings.connect_timeout
    while True:
        try:
            return await upstream.session.request(
                request.method, upstream.url(request.raw_path), headers=headers, data=body, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            if time.monotonic() > deadline or not isinstance(body, bytes | None):
                message = "The engine behind this server cannot be reached."
                raise Refusal(503, "upstream_unavailable", message, retry_after=2.0) from error
            await asyncio.sleep(_RETRY_SECONDS)
        except (aiohttp.SocketTimeoutError, TimeoutError) as error:
            raise _upstream_timeout() from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _upstream_error(f"it did not answer in HTTP ({type(error).__name__})") from error


def _forwarded(headers: Mapping[str, str], ours: set[str]) -> CIMultiDict[str]:
    """Headers that go on: those that are about one connection stay on it, and ours are set by us."""
    listed = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in _HOP_BY_HOP and name.lower() not in ours and name.lower() not in listed
    )


async def _pass_whole(
    request: web.Request, upstream: aiohttp.ClientResponse, passage: Passage | None
) -> web.StreamResponse:
    """Any answer, as it comes."""
    if upstream.status >= 500 and upstream.content_type == "text/html":  # a proxy's page in between
        raise Refusal(upstream.status, "upstream_error", f"The engine answered {upstream.status}.", retry_after=1.0)
    response = web.StreamResponse(status=upstream.status, headers=_forwarded(upstream.headers, _ANSWERED_BY_US))
    writes = request[WRITES]
    if request.method == "HEAD" or upstream.status in (204, 304):
        await response.prepare(request)
        return response
    await response.prepare(request)
    num_bytes = 0
    try:
        async for chunk in _chunks(upstream):
            num_bytes += len(chunk)
            await writes.wait(response.write(chunk))
    except Refusal as failure:
        if passage is not None:
            passage.fail(failure, was_sent=True)
        if request.transport is not None:
            request.transport.abort()  # the client must see that it is not whole
        return response
    if passage is not None:
        if "Content-Encoding" in upstream.headers:
            passage.take_bytes(num_bytes)
        passage.finish(upstream.status)
    await writes.wait(response.write_eof())
    return response


async def _pass_json(request: web.Request, upstream: aiohttp.ClientResponse, passage: Passage) -> web.StreamResponse:
    """An answer that comes as a whole at its end: held until it is known to be one."""
    if upstream.content_length is None or upstream.content_length <= _MAX_HELD_ANSWER:
        answer = b"".join([chunk async for chunk in _chunks(upstream)])
        try:
            msgspec.json.decode(answer, type=msgspec.Raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _upstream_error("its answer is not JSON") from error
        if not passage.take_usage(usage_of(answer)):
            passage.take_bytes(len(answer))
        passage.finish(upstream.status)
        headers = _forwarded(upstream.headers, _ANSWERED_BY_US)
        headers["Content-Length"] = str(len(answer))
        return web.Response(status=upstream.status, body=answer, headers=headers)
    return await _pass_whole(request, upstream, passage)


async def _pass_events(request: web.Request, upstream: aiohttp.ClientResponse, passage: Passage) -> web.StreamResponse:
    """An event stream, event by event as they come."""
    headers = _forwarded(upstream.headers, _ANSWERED_BY_US | {"content-length"})
    headers["X-Accel-Buffering"] = "no"
    response = web.StreamResponse(status=upstream.status, headers=headers)
    await response.prepare(request)
    writes, reader = request[WRITES], EventReader(hides_usage=passage.hides_usage)
    send = EventWriter(request, response)
    failure: Refusal | None = None

    def take(chunk: bytes) -> bool:
        nonlocal failure
        num_events = reader.num_events
        out = reader.feed(chunk)
        failure = passage.take_events(reader.num_events - num_events)  # before somebody who does not read stops us
        return send(out) and failure is None

    try:
        relay = Relay(upstream, take, request.app[SIDECAR].upstream.settings.idle_timeout)
        while failure is None and not relay.has_ended:
            await relay.run()
            await writes.wait(send.drain())
    except TimeoutError:
        failure = _upstream_timeout()
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, ConnectionResetError) and send.is_closed:
            raise  # it is the client who has gone
        failure = _upstream_error("its connection ended before its answer did")
    out = reader.flush()
    passage.take_usage(reader.usage)
    if failure is None and not reader.is_done and request.path in _OPENAI_STREAMS:
        failure = _upstream_error("it ended the stream before it was complete")
    if failure is None:
        passage.finish(upstream.status)
    else:
        passage.fail(failure, was_sent=True)
        request.app[SERVICE].metrics.count_refusal(passage.tenant_id, failure.code)
        out += b"\n\ndata: " + msgspec.json.encode(error_body(failure)) + b"\n\n"
    if out:
        await writes.wait(response.write(out))
    await writes.wait(response.write_eof())
    return response


async def _chunks(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The answer's bytes as they come; raises Refusal where they end before the answer does."""
    try:
        async for chunk in upstream.content.iter_any():
            yield chunk
    except TimeoutError as error:
        raise _upstream_timeout() from error
    except (aiohttp.ClientError, OSError) as error:
        raise _upstream_error("its connection ended before its answer did") from error


def _upstream_error(what: str) -> Refusal:
    return Refusal(502, "upstream_error", f"The engine behind this server failed: {what}.", retry_after=1.0)


def _upstream_timeout() -> Refusal:
    return Refusal(504, "upstream_timeout", "The engine behind this server did not answer in time.", retry_after=1.0)
