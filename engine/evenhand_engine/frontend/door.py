"""Door: what a handler asks of whoever owns quotas, the memory of bodies and metrics, in whichever process that is.

`OwnDoor` is for the owner's own process: it asks without a hop. That of an API server is a `RemoteDoor`.
"""

import math
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.auth import Authenticator
from evenhand_engine.frontend.body_memory import Held
from evenhand_engine.frontend.claims import Claim, Demand, reserve
from evenhand_engine.frontend.service import ActiveRequests, Service


class RateLimit(msgspec.Struct, frozen=True, array_like=True):
    """One quota as it stands: what `x-ratelimit-*` tells. `unit` is requests or tokens, times are in seconds."""

    unit: str
    limit: int
    remaining: int
    reset: int


class Door(Protocol):
    """Where a request asks whether it may pass. Calls raise Refusal where it may not."""

    @property
    def is_configured(self) -> bool:
        """False while it is not known who may use the engine."""
        ...

    @property
    def draining(self) -> bool:
        """True once the server has been told to stop; new requests are refused."""
        ...

    @property
    def authenticator(self) -> Authenticator:
        """By the config in force."""
        ...

    @property
    def active(self) -> ActiveRequests:
        """The requests that this process answers, probes aside."""
        ...

    async def enter(self, tenant_id: str, num_bytes: int, *, generates: bool) -> tuple[Held, int]:
        """Before anything is read of a request: room for its body, which whoever asks must give back, and a request of the
        quota, with how many `Admission.check` took. Not `generates`: as `Admission.count_request` takes it."""
        ...

    async def reserve(self, tenant_id: str, demand: Demand) -> Sequence[Claim]:
        """Claims for all choices of one request, or none."""
        ...

    async def rate_limits(self, tenant_id: str) -> Sequence[RateLimit]:
        """The tenant's quotas as they stand."""
        ...

    async def queue_delay(self, tenant_id: str) -> float:
        """`Admission.queue_delay`."""
        ...

    async def health(self) -> str | None:
        """What is wrong with the engine; None: nothing."""
        ...

    async def metrics_text(self) -> bytes:
        """What the public port shows of the metrics."""
        ...

    async def load(self) -> int:
        """Requests in flight, of all that serve the public port."""
        ...

    def count_refusal(self, tenant_id: str, code: str) -> None: ...

    def count_stalled(self, tenant_id: str) -> None:
        """The client has not read its answer in time."""
        ...


class OwnDoor:
    """The door of the process that owns everything behind it. No call waits."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def is_configured(self) -> bool:
        return self._service.is_configured

    @property
    def draining(self) -> bool:
        return self._service.draining

    @property
    def authenticator(self) -> Authenticator:
        return self._service.authenticator

    @property
    def active(self) -> ActiveRequests:
        return self._service.active

    async def enter(self, tenant_id: str, num_bytes: int, *, generates: bool) -> tuple[Held, int]:
        return enter(self._service, tenant_id, num_bytes, generates=generates)

    async def reserve(self, tenant_id: str, demand: Demand) -> Sequence[Claim]:
        return reserve(self._service.admission, self._service.metrics, tenant_id, demand, time.monotonic())

    async def rate_limits(self, tenant_id: str) -> Sequence[RateLimit]:
        return rate_limits(self._service, tenant_id)

    async def queue_delay(self, tenant_id: str) -> float:
        return self._service.admission.queue_delay(tenant_id, time.monotonic())

    async def health(self) -> str | None:
        return self._service.health(time.monotonic())

    async def metrics_text(self) -> bytes:
        return self._service.public_metrics()

    async def load(self) -> int:
        return self._service.backend.num_in_flight

    def count_refusal(self, tenant_id: str, code: str) -> None:
        self._service.metrics.count_refusal(tenant_id, code)

    def count_stalled(self, tenant_id: str) -> None:
        self._service.metrics.count_stalled(tenant_id)


def enter(service: Service, tenant_id: str, num_bytes: int, *, generates: bool) -> tuple[Held, int]:
    """See `Door.enter`. Where the tenant's bodies take too much, it may come back when one of its requests has ended."""
    admission, now = service.admission, time.monotonic()
    held = service.bodies.hold(tenant_id, num_bytes, admission.queue_delay(tenant_id, now))
    try:
        if generates:
            return held, admission.check(tenant_id, now)
        admission.count_request(tenant_id, now)
        return held, 1
    except Refusal:
        held.release()
        raise


def rate_limits(service: Service, tenant_id: str) -> list[RateLimit]:
    account, now = service.admission.account(tenant_id), time.monotonic()
    return [
        RateLimit(unit, bucket.limit, max(0, math.floor(bucket.level(now))), math.ceil(bucket.seconds_until_full(now)))
        for unit, bucket in (("requests", account.requests), ("tokens", account.tokens))
        if bucket is not None
    ]


DOOR = web.AppKey("door", Door)
