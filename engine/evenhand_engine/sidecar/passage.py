"""Passage: what must end exactly once for a request that computes, whatever happens: quota, turn, metrics."""

import asyncio
import math
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
from evenhand_engine.sidecar.body import MAX_CHOICES, Body, is_true
from evenhand_engine.sidecar.events import Usage
from evenhand_engine.sidecar.service import SidecarService

OPENAI_STREAMS = ("/v1/completions", "/v1/chat/completions")
_WITHOUT_OUTPUTS = {  # parts of paths whose answers are no generated text
    *(
        "embeddings",
        "embedding",
        "embed",
        "rerank",
        "reranking",
        "score",
        "classify",
        "pooling",
        "encode",
        "moderations",
    ),
}


class Passage:
    """One request that computes: a context that settles quota and metrics when it is left.

    Args:
        body: None: it is streamed, and not looked at.
        num_bytes: size of the body, as far as it may be text.
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
        self._reservations: list[Reservation] = []  # one for each answer that is asked for
        self._was_computed = True  # the prompt, as far as we know; not if the upstream refused it

    def __enter__(self) -> "Passage":
        service, now, body = self.service, time.monotonic(), self.body
        num_prompts, num_choices = (1, 1) if body is None else (body.num_prompts, body.num_choices)
        self._num_prompts, room = num_prompts, service.info.max_model_len
        if num_choices > MAX_CHOICES:
            raise Refusal(400, "invalid_value", f"A body asks for at most {MAX_CHOICES} answers, over all its prompts.")
        if body is not None and is_true(body.value("background")):  # it would be answered at once, and computed past us
            message = "An answer in the background is not passed on: it would be computed past every queue and quota."
            raise Refusal(400, "unsupported", message, param="background")
        most = service.admission.max_concurrent_requests(self.tenant_id)
        if most is not None and num_choices > most:
            message = f"The engine runs all {num_choices} answers of a body at once; the policy of tenant {self.tenant_id} allows {most}."
            raise Refusal(400, "invalid_value", message)
        if num_prompts > 1 and self.num_prompt_tokens > room:  # so that nobody waits for more than one long prompt
            message = (
                f"The prompts of one body have at most {room} tokens together; send others in requests of their own."
            )
            raise Refusal(400, "invalid_value", message, param="prompt")
        self.num_prompt_tokens = min(self.num_prompt_tokens, room - 1)  # what is too long, the upstream refuses
        length = math.ceil(self.num_prompt_tokens / num_prompts)
        asked = None if body is None else body.max_output_tokens(self.path)
        self._limit = min(asked or service.admission.max_output_tokens(self.tenant_id, length), room - length)
        expected = None if asked else service.admission.expected_output_tokens(self.tenant_id)
        costs = [Cost(length, self._limit, expected)] * num_choices
        self._reservations = service.admission.reserve(self.tenant_id, costs, now, self._num_taken)
        self.max_output_tokens = self._limit * num_choices
        self.errand = Errand(
            f"{self.request_id}-{id(self):x}",
            self.tenant_id,
            now,
            num_prompt_tokens=self.num_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            user="" if body is None else body.user,
            priority=0 if body is None else body.priority,
            num_choices=num_choices,
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
        num_prompt_tokens = math.ceil(self.num_prompt_tokens / self._num_prompts) if self._was_computed else 0
        share, rest = divmod(num_outputs, len(self._reservations))
        for number, reservation in enumerate(self._reservations):
            reservation.resize_prompt(num_prompt_tokens)
            self.service.admission.settle(reservation, share + (number < rest), now)
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
        for reservation in self._reservations:
            self.service.admission.start(reservation)
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
        limits = self.service.admission.account(self.tenant_id).config.limits
        is_limited = limits.max_output_tokens is not None or limits.tokens_per_minute is not None
        if is_limited and body.max_output_tokens(self.path) is None:
            body.limit_outputs(self.path, self._limit)
        if self.path in OPENAI_STREAMS and self.is_stream:
            options = body.value("stream_options")
            options = options if isinstance(options, dict) else {}
            self.hides_usage = not is_true(options.get("include_usage"))
            if options.get("include_usage") is not True:
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
        self._reservations.append(self._reservations.pop(0))  # whose it is, nobody says: each in turn
        if self.service.admission.generated(self._reservations[0], num_events, now):
            return None
        message = f"Tenant {self.tenant_id} has used its tokens per minute."
        delay = self.service.admission.queue_delay(self.tenant_id, now)
        return Refusal(429, "tokens_per_minute", message, retry_after=delay)

    def take_usage(self, usage: Usage | None) -> bool:
        """The upstream says what it was; returns whether it is believed, which it is within what is possible."""
        most = self.service.info.max_model_len * self._num_prompts
        if usage is None or not usage.is_plausible(most, self.max_output_tokens):
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
        if _WITHOUT_OUTPUTS.isdisjoint(self.path.split("/")):
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
