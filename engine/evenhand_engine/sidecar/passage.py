"""Passage: one request that computes, as the process at the public port sees it: its body made ready, its answer counted, its ticket.

What must end exactly once, whatever happens, is the ticket's; a Passage sees that it is closed.
"""

import asyncio
from typing import Any

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.keys import LOG_FIELDS, TENANT_ID
from evenhand_engine.sidecar.body import MAX_CHOICES, Body, is_true
from evenhand_engine.sidecar.events import Usage
from evenhand_engine.sidecar.front import Front
from evenhand_engine.sidecar.ticket import Booking, Ticket

OPENAI_STREAMS = ("/v1/completions", "/v1/chat/completions")
_WITHOUT_OUTPUTS = {  # parts of paths whose answers are no generated text
    *("embeddings", "embedding", "embed", "rerank", "reranking", "score", "classify", "pooling", "encode"),
    "moderations",
}


class Passage:
    """One request that computes: a context that holds its ticket.

    Args:
        body: None: it is streamed, and not looked at.
        num_bytes: size of the body, as far as it may be text.
        num_taken: requests of the quota that it has taken already.
    """

    def __init__(self, front: Front, request: web.Request, body: Body | None, num_bytes: int, num_taken: int) -> None:
        self._num_taken = num_taken
        self.front = front
        self.body = body
        self.tenant_id: str = request[TENANT_ID]
        self.is_stream = body is not None and body.is_stream
        self.path = request.path
        self.num_bytes = num_bytes
        self.num_prompt_tokens = front.prompts.bytes_per_token.estimate(self.tenant_id, num_bytes)
        self.hides_usage = False
        self.outcome = ("failed", "upstream_error")
        self._log: dict[str, Any] = request[LOG_FIELDS]

    async def __aenter__(self) -> "Passage":
        booking = self._booking()
        self._num_prompts, self._num_choices = booking.num_prompts, booking.num_choices
        self.ticket: Ticket = await self.front.tickets.book(booking)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError | ConnectionResetError):
            self.outcome = ("aborted", "client_gone")
        self.ticket.close(*self.outcome)
        self._log |= {"prompt_tokens": self.num_prompt_tokens, "output_tokens": self.ticket.num_output_tokens}

    def _booking(self) -> Booking:
        """Raises Refusal for what nobody may ask."""
        body, room = self.body, self.front.max_model_len
        num_prompts, num_choices = (1, 1) if body is None else (body.num_prompts, body.num_choices)
        if num_choices > MAX_CHOICES:
            raise Refusal(400, "invalid_value", f"A body asks for at most {MAX_CHOICES} answers, over all its prompts.")
        if body is not None and is_true(body.value("background")):  # it would be answered at once, and computed past us
            message = "An answer in the background is not passed on: it would be computed past every queue and quota."
            raise Refusal(400, "unsupported", message, param="background")
        if num_prompts > 1 and self.num_prompt_tokens > room:  # so that nobody waits for more than one long prompt
            message = (
                f"The prompts of one body have at most {room} tokens together; send others in requests of their own."
            )
            raise Refusal(400, "invalid_value", message, param="prompt")
        self.num_prompt_tokens = min(self.num_prompt_tokens, room - 1)  # what is too long, the upstream refuses
        return Booking(
            tenant_id=self.tenant_id,
            num_prompt_tokens=self.num_prompt_tokens,
            num_prompts=num_prompts,
            num_choices=num_choices,
            max_output_tokens=None if body is None else body.max_output_tokens(self.path),
            user="" if body is None else body.user,
            priority=0 if body is None else body.priority,
            is_silent=not self.is_stream,
            num_taken=self._num_taken,
        )

    async def turn(self) -> None:
        """Wait until the request is to be sent. Raises Refusal if it never will be."""
        try:
            await self.ticket.turn()
        except Refusal as refusal:
            self.outcome = ("refused", refusal.code)
            raise

    def prepare(self, body: Body) -> None:
        """Make the body the upstream's: with usage asked for, bounded by the policy, and without a priority of the client's."""
        if body.fields is None:
            return
        if bytes(body.fields.get("stream", b"null")) not in (b"true", b"false", b"null"):
            body.set("stream", self.is_stream)  # else an engine may answer as a whole what is taken for a stream
        tenant = self.front.tickets.tenant(self.tenant_id)
        body.set("priority", self.front.options.upstream_priority(tenant))
        if (salt := self.front.options.cache_salt(self.tenant_id, tenant)) is not None:
            body.set("cache_salt", salt)
        limits = tenant.limits
        is_limited = limits.max_output_tokens is not None or limits.tokens_per_minute is not None
        if is_limited and body.max_output_tokens(self.path) is None:
            body.limit_outputs(self.path, self.ticket.limit)
        if self.path in OPENAI_STREAMS and self.is_stream:
            options = body.value("stream_options")
            options = options if isinstance(options, dict) else {}
            self.hides_usage = not is_true(options.get("include_usage"))
            if options.get("include_usage") is not True:
                body.set("stream_options", {**options, "include_usage": True})

    # -- what the upstream does

    def take_usage(self, usage: Usage | None) -> bool:
        """The upstream says what it was; returns whether it is believed, which it is within what is possible."""
        most = self.front.max_model_len * self._num_prompts
        if usage is None or not usage.is_plausible(most, self.ticket.limit * self._num_choices):
            return False
        if usage.num_prompt_tokens:
            self.num_prompt_tokens = usage.num_prompt_tokens
            self.front.prompts.bytes_per_token.learn(self.tenant_id, self.num_bytes, usage.num_prompt_tokens)
            self.ticket.sized(usage.num_prompt_tokens, usage.num_cached_tokens)
        if usage.num_output_tokens is not None:
            self.ticket.counted(usage.num_output_tokens)
        return True

    def take_bytes(self, num_bytes: int) -> None:
        """An answer of that size does not say, or not so that it can be read, how many tokens it has."""
        if _WITHOUT_OUTPUTS.isdisjoint(self.path.split("/")):
            estimate = self.front.prompts.bytes_per_token.estimate(self.tenant_id, num_bytes)
            self.ticket.counted(min(estimate, self.ticket.limit * self._num_choices), is_estimate=True)

    def finish(self, status: int) -> None:
        """The answer is complete. One that refuses, or leads elsewhere, cost nothing."""
        if status >= 300:
            self.ticket.sized(0)
            self.outcome = ("failed", "upstream_refused")
        else:
            self.outcome = ("finished", "stop")
            self.ticket.complete()

    def fail(self, refusal: Refusal, *, was_sent: bool) -> None:
        """There will be no answer, or no more of it. What was not sent was not computed."""
        self.outcome = ("failed", refusal.code)
        if not was_sent:
            self.ticket.sized(0)
