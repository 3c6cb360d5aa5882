"""A door in another process and its owner: both ends of their channel in one event loop."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

from evenhand_engine.backends.backend import Enforcer, ModelInfo
from evenhand_engine.frontend.body_memory import Held
from evenhand_engine.frontend.channel import Channel
from evenhand_engine.frontend.claims import Demand
from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import ConfigDocument
from evenhand_engine.frontend.door import Door
from evenhand_engine.frontend.door_messages import ToOwner
from evenhand_engine.frontend.doorkeeper import Doorkeeper
from evenhand_engine.frontend.quota import TokenBucket
from evenhand_engine.frontend.remote_door import RemoteDoor
from evenhand_engine.frontend.service import Service
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_policy.config import Limits, SchedulerConfig, TenantConfig
from evenhand_policy.credentials import key_hash
from evenhand_policy.push_protocol import ConfigSource

KEY = "the-key-of-a-tenant-with-limits"
WAIT_SECONDS = 120.0


class Idle:
    """A backend that serves a model and has nothing to do."""

    info = ModelInfo(model_name="tiny", max_model_len=1000)
    stats = failure = None

    def on_stats(self, listener: object) -> None: ...

    def reconfigure(self, config: SchedulerConfig, num_replicas: int = 1) -> None: ...

    def seconds_without_progress(self, now: float) -> float:
        return 0.0


class Ends:
    """The owner and an API server, joined by a channel."""

    def __init__(self) -> None:
        self.settings = ServerSettings(max_tenant_body_bytes=100)
        config = SchedulerConfig(tenants=(tenant(requests_per_minute=4, tokens_per_minute=800),))
        in_force = ConfigInForce(ConfigDocument.unversioned(config, ConfigSource.FILES))
        self.service = Service(self.settings, cast(Enforcer, Idle()), in_force)
        self.tokens.rate = 1e-9
        self.num_in_flight = 0
        self.lost = asyncio.Event()
        self.channel: Channel[ToOwner] = Channel(ToOwner, self._receive, self.lost.set)
        self.keeper = Doorkeeper(self.service, self.channel, self._count)
        self.door = RemoteDoor(self.settings)

    def _receive(self, message: ToOwner) -> None:
        self.keeper.receive(message)

    def _count(self, change: int) -> None:
        self.num_in_flight += change

    async def open(self) -> None:
        ours, theirs = socket.socketpair()
        await self.channel.open(ours)
        await self.door.channel.open(theirs)
        self.keeper.enforce(self.service.in_force.config)
        await asyncio.wait_for(self.door.configured.wait(), WAIT_SECONDS)

    async def settle(self) -> None:
        """Until all that the API server told has arrived."""
        await self.door.health()

    @property
    def tokens(self) -> TokenBucket:
        """Of the tenant, which time does not refill here."""
        bucket = self.service.admission.account("t").tokens
        assert bucket is not None
        return bucket

    @property
    def in_flight(self) -> int:
        return self.service.admission.account("t").num_in_flight


def tenant(key: str = KEY, **limits: Any) -> TenantConfig:
    return TenantConfig(tenant_id="t", key_hashes=(key_hash(key),), limits=Limits(**limits))


@contextlib.asynccontextmanager
async def joined() -> AsyncIterator[Ends]:
    ends = Ends()
    await ends.open()
    try:
        yield ends
    finally:
        ends.channel.close()
        ends.door.channel.close()
        await asyncio.wait_for(ends.lost.wait(), WAIT_SECONDS)
        await asyncio.wait_for(ends.door.told_to_stop.wait(), WAIT_SECONDS)


async def enter(door: Door, tenant_id: str, num_bytes: int = 0) -> tuple[Held, int]:
    return await door.enter(tenant_id, num_bytes, generates=True)


DEMAND = Demand(prompt_lengths=(10, 20), num_choices=2, max_tokens=5, num_taken=1)
