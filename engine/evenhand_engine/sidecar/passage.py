"""Passage: what must end exactly once for a request that computes, whatever happens: quota, turn, metrics."""

import asyncio
import time
from typing import Any

from aiohttp import web

from evenhand_engine.dispatch.dispatcher import Errand
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.account import Cost, Reservation
from evenhand_engine.frontend.metrics import RequestMetrics
from evenhand_engine.frontend.service import LOG_FIELDS, REQUEST_ID, TENANT_ID
from evenhand_engine.openai.errors import refuse_draining, refuse_finished
from evenhand_engine.scheduler.request import FinishReason
from evenhand_engine.sidecar.body import Body
from evenhand_engine.sidecar.events import Usage
from evenhand_engine.sidecar.service import SidecarService

OPENAI_STREAMS = ("/v1/completions", "/v1/chat/completions")


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
        if self.path in OPENAI_STREAMS:
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
        if self.path in OPENAI_STREAMS:
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
