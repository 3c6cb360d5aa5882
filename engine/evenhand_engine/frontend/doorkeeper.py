"""Doorkeeper: the owner's end of the channel to one API server. Answers its calls, and keeps what it holds.

When the API server is gone, what it held is given back, so that nothing of a tenant's is lost with it.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend import door_messages
from evenhand_engine.frontend.body_memory import Held
from evenhand_engine.frontend.channel import Channel
from evenhand_engine.frontend.claims import OwnClaim, reserve
from evenhand_engine.frontend.door import enter, rate_limits
from evenhand_engine.frontend.service import Service
from evenhand_policy.config import SchedulerConfig

log = logging.getLogger(__name__)


class Doorkeeper:
    """Serves one API server.

    Args:
        count_in_flight: called with the change whenever it has more or fewer requests in flight.

    Attributes:
        is_current: whether the API server enforces the config that it was sent last.
    """

    def __init__(self, service: Service, channel: Channel[Any], count_in_flight: Callable[[int], None]) -> None:
        self.is_current = False
        self._service = service
        self._channel = channel
        self._count_in_flight = count_in_flight
        self._claims: dict[int, OwnClaim] = {}
        self._bodies: dict[int, Held] = {}
        self._number = 0  # of the last config

    def enforce(self, config: SchedulerConfig, *, is_configured: bool = True) -> None:
        """Have it enforce `config`; not `is_configured`: serve nobody yet."""
        self._number += 1
        self.is_current = False
        self._channel.send(door_messages.Enforce(self._number, config, is_configured))

    def close(self) -> int:
        """Give back everything; returns how many requests ended by that."""
        now, claims = time.monotonic(), self._claims
        for claim in claims.values():
            claim.ended("failed", "api_server_dead", claim.num_output_tokens, 0, now)
        for body in self._bodies.values():
            body.release()
        self._count_in_flight(-len(claims))
        self._claims, self._bodies = {}, {}
        return len(claims)

    def receive(self, message: door_messages.ToOwner) -> None:
        """Take in one message of the API server."""
        match message:
            case door_messages.Call():
                self.answer(message.call_id, functools.partial(self._result, message))
            case door_messages.Progress():
                self._take_progress(message)
            case door_messages.Ended():
                self._end(message)
            case door_messages.Resize():
                self._bodies[message.body].resize(message.num_bytes)
            case door_messages.Release():
                if (body := self._bodies.pop(message.body, None)) is not None:  # None: refused, while its client left
                    body.release()
            case door_messages.RefusalCounted():
                self._service.metrics.count_refusal(message.tenant_id, message.code)
            case door_messages.ClientStalled():
                self._service.metrics.count_stalled(message.tenant_id)
            case door_messages.Enforces():
                self.is_current = message.number == self._number

    def answer(self, call_id: int, compute: Callable[[], Any]) -> None:
        """Answer a call with what `compute` returns, or the Refusal that it raises."""
        try:
            result = compute()
        except Refusal as refusal:
            self._refuse(call_id, refusal)
        except Exception:  # a fault of this call alone
            log.exception("a call of an API server failed")
            self._refuse(call_id, Refusal(500, "internal_error", "The server failed to answer.", retry_after=1))
        else:
            self._channel.send(door_messages.Answer(call_id, msgspec.Raw(msgspec.msgpack.encode(result))))

    def _refuse(self, call_id: int, refusal: Refusal) -> None:
        self._channel.send(door_messages.Refused(call_id, door_messages.ToldRefusal.of(refusal)))

    def _result(self, call: door_messages.AnyCall) -> Any:
        service, now = self._service, time.monotonic()
        match call:
            case door_messages.Enter():
                body, num_taken = enter(service, call.tenant_id, call.num_bytes, generates=call.generates)
                self._bodies[call.body] = body
                return num_taken
            case door_messages.Reserve():
                return self._reserve(call, now)
            case door_messages.AskRateLimits():
                return rate_limits(service, call.tenant_id)
            case door_messages.AskQueueDelay():
                return service.admission.queue_delay(call.tenant_id, now)
            case door_messages.AskHealth():
                return service.health(now)
            case door_messages.AskMetrics():
                return service.public_metrics()
            case door_messages.AskLoad():
                return service.backend.num_in_flight

    def _reserve(self, call: door_messages.Reserve, now: float) -> list[int]:
        claims = reserve(self._service.admission, self._service.metrics, call.tenant_id, call.demand, now)
        for number, claim in enumerate(claims, call.first_claim):
            self._claims[number] = claim
            claim.exhausted = functools.partial(self._channel.send, door_messages.Exhausted(number))
        self._count_in_flight(len(claims))
        return [claim.max_tokens for claim in claims]

    def _take_progress(self, progress: door_messages.Progress) -> None:
        for number, num_cached_tokens in progress.started:
            self._claims[number].started(num_cached_tokens, progress.now)
        for number, num_tokens in progress.generated:
            self._claims[number].generated(num_tokens, progress.now)

    def _end(self, ended: door_messages.Ended) -> None:
        claim = self._claims.pop(ended.claim, None)
        if claim is None:
            return  # refused, while its client left
        claim.ended(ended.outcome, ended.reason, ended.num_output_tokens, ended.num_preemptions, ended.now)
        self._count_in_flight(-1)
