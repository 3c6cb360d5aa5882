"""RemoteDoor: the door of an API server, which asks the process that owns quotas, memory and metrics.

A call is one message there and one back. What happens to requests is told, once for each step, and not waited for: quotas follow
what was computed some milliseconds later than in one process. An owner who stands still is given up, as one that is gone: what waits
for him is refused, what runs goes on to its end, and another process takes this one's place once he moves again.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from evenhand_engine.errors import EngineDeadError, Refusal
from evenhand_engine.frontend import door_messages
from evenhand_engine.frontend.auth import Authenticator
from evenhand_engine.frontend.body_memory import Held
from evenhand_engine.frontend.channel import Channel
from evenhand_engine.frontend.claims import Claim, Demand
from evenhand_engine.frontend.door import RateLimit
from evenhand_engine.frontend.service import ActiveRequests
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_policy.config import SchedulerConfig

T = TypeVar("T")

log = logging.getLogger(__name__)

_SILENCE_SECONDS = 10.0  # twice of which the owner may leave a call unanswered; once may be a machine that was asleep


class RemoteDoor:
    """See `Door`.

    Args:
        kind: of the messages that the owner sends, where there are others than a door's; `take_other` takes those.

    Attributes:
        authenticator: known once `configured` is set.
        configured: set with the first config.
        told_to_stop: set when the owner says so, or is gone.
        told_to_cut: set when he says that what still runs must end.
        left_alone: set when the owner is gone.
        channel: to the owner; to be opened by whoever makes this.
    """

    authenticator: Authenticator

    def __init__(self, settings: ServerSettings, kind: Any = door_messages.ToApiServer) -> None:
        self.is_configured = False
        self.draining = False
        self.active = ActiveRequests()
        self.configured = asyncio.Event()
        self.told_to_stop = asyncio.Event()
        self.told_to_cut = asyncio.Event()
        self.left_alone = asyncio.Event()
        self.channel: Channel[Any] = Channel(kind, self._receive, self.lose)
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._num_silences = 0  # in a row
        self._watch: asyncio.TimerHandle | None = None  # while there are calls
        self._claims: dict[int, _RemoteClaim] = {}
        self._limited = frozenset[str]()  # tenants with a quota
        self._progress: list[door_messages.Progress] = []  # yet to be told

    # -- asked

    async def enter(self, tenant_id: str, num_bytes: int, *, generates: bool) -> tuple[Held, int]:
        held = _RemoteHeld(self.channel, self.new_number())
        call = door_messages.Enter(
            call_id=self.new_number(),
            tenant_id=tenant_id,
            body=held.number,
            num_bytes=num_bytes,
            generates=generates,
        )
        try:
            return held, await self.call(call, int)
        except asyncio.CancelledError:  # he may hold it
            held.release()
            raise

    async def reserve(self, tenant_id: str, demand: Demand) -> Sequence[Claim]:
        claims = [_RemoteClaim(self, self.new_number()) for _ in range(demand.num_claims)]
        self._claims |= {claim.number: claim for claim in claims}
        call_id, first = self.new_number(), claims[0].number
        try:
            limits = await self.call(
                door_messages.Reserve(call_id=call_id, tenant_id=tenant_id, demand=demand, first_claim=first), list[int]
            )
        except BaseException as error:
            for claim in claims:  # of one that was refused, the owner knows nothing; of a client that left, it may
                if isinstance(error, Refusal):
                    del self._claims[claim.number]
                else:
                    claim.ended("aborted", "client_gone", 0, 0, time.monotonic())
            raise
        for claim, limit in zip(claims, limits, strict=True):
            claim.max_tokens = limit
        return claims

    async def rate_limits(self, tenant_id: str) -> Sequence[RateLimit]:
        if tenant_id not in self._limited:
            return ()
        return await self.call(
            door_messages.AskRateLimits(call_id=self.new_number(), tenant_id=tenant_id), list[RateLimit]
        )

    async def queue_delay(self, tenant_id: str) -> float:
        return await self.call(door_messages.AskQueueDelay(call_id=self.new_number(), tenant_id=tenant_id), float)

    async def health(self) -> str | None:
        problem = await self.call(door_messages.AskHealth(call_id=self.new_number()), object)
        return None if problem is None else str(problem)

    async def metrics_text(self) -> bytes:
        return await self.call(door_messages.AskMetrics(call_id=self.new_number()), bytes)

    async def load(self) -> int:
        return await self.call(door_messages.AskLoad(call_id=self.new_number()), int)

    # -- told

    def count_refusal(self, tenant_id: str, code: str) -> None:
        self.channel.send(door_messages.RefusalCounted(tenant_id, code))

    def count_stalled(self, tenant_id: str) -> None:
        self.channel.send(door_messages.ClientStalled(tenant_id))

    def progress(self, now: float) -> door_messages.Progress:
        """Where to write down what came at `now`, which is told soon."""
        if not self._progress:
            self._loop.call_soon(self._tell_progress)
        if not self._progress or self._progress[-1].now != now:
            self._progress.append(door_messages.Progress(now, [], []))
        return self._progress[-1]

    def end(self, ended: door_messages.Ended) -> None:
        """Nothing more is told of the claim."""
        del self._claims[ended.claim]
        self._tell_progress()
        self.channel.send(ended)

    def _tell_progress(self) -> None:
        for progress in self._progress:
            self.channel.send(progress)
        self._progress.clear()

    # -- the channel

    def new_number(self) -> int:
        """For a call, or for what the owner is to hold."""
        return next(self._numbers)

    async def call(self, call: door_messages.Call, kind: type[T]) -> T:
        """The owner's answer. Raises Refusal, or EngineDeadError if he is gone or given up."""
        if self.channel.is_closed:
            raise EngineDeadError("the process that owns quotas is gone")
        answer: asyncio.Future[msgspec.Raw] = self._loop.create_future()
        self._calls[call.call_id] = answer
        if self._watch is None:
            self._num_silences = 0
            self._watch = self._loop.call_later(_SILENCE_SECONDS, self._note_silence)
        self.channel.send(call)
        try:
            return msgspec.msgpack.decode(await answer, type=kind)
        finally:
            del self._calls[call.call_id]

    def _note_silence(self) -> None:
        self._watch, self._num_silences = None, self._num_silences + 1
        if self._num_silences == 2:
            log.error("the process that owns quotas stands still, and is given up")
            self.channel.give_up()
        elif self._calls:
            self._watch = self._loop.call_later(_SILENCE_SECONDS, self._note_silence)

    def _receive(self, message: Any) -> None:
        self._num_silences = 0
        match message:
            case door_messages.Answer():
                self._resolve(message.call_id, lambda answer: answer.set_result(message.result))
            case door_messages.Refused():
                self._resolve(message.call_id, lambda answer: answer.set_exception(message.why.refusal()))
            case door_messages.Enforce():
                self.enforce(message.config, message.is_configured)
                self.channel.send(door_messages.Enforces(message.number))
            case door_messages.Exhausted():
                if (claim := self._claims.get(message.claim)) is not None:
                    claim.exhausted()
            case door_messages.Drain():
                self.draining = True
                self.told_to_stop.set()
            case door_messages.Cut():
                self.told_to_cut.set()
            case _:
                self.take_other(message)

    def take_other(self, message: Any) -> None:
        """What came is no message of a door."""

    def _resolve(self, call_id: int, resolve: Callable[["asyncio.Future[msgspec.Raw]"], None]) -> None:
        answer = self._calls.get(call_id)
        if answer is not None and not answer.done():
            resolve(answer)

    def enforce(self, config: SchedulerConfig, is_configured: bool) -> None:
        """From now on."""
        self.is_configured = is_configured
        self.authenticator = Authenticator.of(self._settings, config)
        self._limited = frozenset(
            tenant.tenant_id
            for tenant in config.tenants
            if tenant.limits.requests_per_minute is not None or tenant.limits.tokens_per_minute is not None
        )
        self.configured.set()

    def lose(self) -> None:
        """The owner is gone, or given up."""
        if self._watch is not None:
            self._watch.cancel()
        self.draining = True
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDeadError("the process that owns quotas is gone"))
        self.told_to_stop.set()
        self.left_alone.set()


class _RemoteClaim:
    """See `Claim`."""

    def __init__(self, door: RemoteDoor, number: int) -> None:
        self.number = number
        self.max_tokens = 0  # until the owner has answered
        self.exhausted: Callable[[], None] = _ignore
        self._door = door
        self._is_open = True

    def started(self, num_cached_tokens: int, now: float) -> None:
        self._door.progress(now).started.append((self.number, num_cached_tokens))

    def generated(self, num_tokens: int, now: float) -> None:
        self._door.progress(now).generated.append((self.number, num_tokens))

    def ended(self, outcome: str, reason: str, num_output_tokens: int, num_preemptions: int, now: float) -> None:
        if self._is_open:
            self._is_open = False
            self._door.end(door_messages.Ended(self.number, outcome, reason, num_output_tokens, num_preemptions, now))


class _RemoteHeld:
    """See `Held`."""

    def __init__(self, channel: Channel[Any], number: int) -> None:
        self.number = number
        self._channel = channel

    def resize(self, size: int) -> None:
        self._channel.send(door_messages.Resize(self.number, size))

    def release(self) -> None:
        self._channel.send(door_messages.Release(self.number))


def _ignore() -> None: ...
