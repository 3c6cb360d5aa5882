"""Service: the owner of what tenants share, and the one place where a new config takes effect."""

import asyncio
import time
from typing import Protocol

from aiohttp import web

from evenhand_engine.backends.backend import Enforcer, ModelInfo
from evenhand_engine.frontend.admission import Admission
from evenhand_engine.frontend.auth import Authenticator
from evenhand_engine.frontend.body_memory import BodyMemory
from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import ConfigDocument
from evenhand_engine.frontend.metrics import Metrics
from evenhand_engine.frontend.metrics_collector import Snapshot
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.frontend.share_tracker import ShareTracker
from evenhand_engine.messages import EngineStats, TenantStats
from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig
from evenhand_policy.push_protocol import ConfigSource


class ActiveRequests:
    """Counts requests between entering and leaving; a drain waits until there are none."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self._count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if self._count == 0:
            self._idle.set()

    async def wait_until_none(self) -> None:
        await self._idle.wait()


class ApiSide(Protocol):
    """The processes at the public port, where they are others than the owner's."""

    @property
    def problem(self) -> str | None:
        """Why the public port is served by nobody; None: it is."""
        ...

    @property
    def is_current(self) -> bool:
        """Whether all of them enforce the config in force."""
        ...

    def enforce(self, config: SchedulerConfig) -> None:
        """Enforce `config` from now on."""
        ...

    async def wait_until_idle(self) -> None:
        """Of a drain: until all have answered what they had, or are gone."""
        ...


class Service:
    """What the current config makes of authentication and admission, whoever generates, and what tenants use of it.

    Attributes:
        in_force: the config in force, and where it came from.
        api_side: the processes at the public port; None: this one is.
        draining: True once the server has been told to stop; new requests are refused.
        active: the requests that are being answered, probes aside.
        bodies: the memory that their bodies take.
    """

    def __init__(
        self,
        settings: ServerSettings,
        backend: Enforcer,
        in_force: ConfigInForce,
    ) -> None:
        self.settings = settings
        self._enforcer = backend
        self.in_force = in_force
        self.api_side: ApiSide | None = None
        self.draining = False
        self.admission = Admission(in_force.config, max_model_len=self.info.max_model_len, now=time.monotonic())
        self.authenticator = Authenticator.of(settings, in_force.config)
        self.active = ActiveRequests()
        self.bodies = BodyMemory(settings.max_tenant_body_bytes)
        self.tenants: dict[str, TenantStats] = {}
        self.shares = ShareTracker()
        self.metrics = Metrics(self.model_names[0], self.info.max_model_len, self._snapshot)
        backend.on_stats(self._take_stats)
        backend.reconfigure(in_force.config)
        in_force.on_change(self._enforce)

    @property
    def backend(self) -> Enforcer:
        """Who enforces the config behind the door."""
        return self._enforcer

    @property
    def backend_name(self) -> str:
        """What generates, in a word."""
        return "evenhand"

    @property
    def info(self) -> ModelInfo:
        return self.backend.info

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.settings.names_of(self.info.model_name)

    @property
    def is_configured(self) -> bool:
        """False while an operator's config was neither loaded nor pushed; requests are refused."""
        waits = self.settings.push is not None and not self.settings.allow_unconfigured
        return not waits or self.in_force.source is not ConfigSource.BUILT_IN

    def _enforce(self, document: ConfigDocument) -> None:
        """Enforce a config from now on, here and in the engine; requests in flight go on."""
        config, num_replicas = document.config, document.assignment.num_replicas
        self.authenticator = Authenticator.of(self.settings, config)
        self.admission.reconfigure(config, time.monotonic(), num_replicas)
        self.backend.reconfigure(config, num_replicas)
        if self.api_side is not None:
            self.api_side.enforce(config)

    def health(self, now: float) -> str | None:
        """What is wrong with the engine; None while it makes progress or has nothing to do."""
        if self.backend.failure is not None:
            return "the engine is gone"  # why is in the log: it may tell of a tenant's request
        if self.api_side is not None and (problem := self.api_side.problem):
            return problem
        stalled = self.backend.seconds_without_progress(now)
        return f"the engine has made no progress for {stalled:.0f} s" if stalled > self.settings.stall_timeout else None

    def public_metrics(self) -> bytes:
        """What the public port shows of the metrics, in Prometheus' text format: nothing of tenants."""
        return self.metrics.public_text()

    async def wait_until_idle(self) -> None:
        """Of a drain: until nothing is answered any more; probes aside."""
        if self.api_side is None:
            await self.active.wait_until_none()
        else:
            await self.api_side.wait_until_idle()

    def ailment(self) -> str | None:
        """What is wrong with how the config in force is enforced, or with the engine; None: nothing."""
        if problem := self.health(time.monotonic()):
            return problem
        stats = self.backend.stats
        if stats is None or stats.config_digest != self.in_force.digest:
            return "the engine's core does not enforce the config yet"
        if self.api_side is not None and not self.api_side.is_current:
            return "an API server does not enforce the config yet"
        return None

    def _take_stats(self, stats: EngineStats) -> None:
        self.metrics.observe_stats(stats)
        self.tenants |= {tenant.tenant_id: tenant for tenant in stats.tenants}
        for tenant_id in stats.retired_tenants:
            self.tenants.pop(tenant_id, None)
            self.shares.forget(tenant_id)
        busy = {t.tenant_id for t in stats.tenants}
        busy |= {t.tenant_id for t in self.tenants.values() if t.num_running or t.num_waiting}
        services = {tenant.tenant_id: tenant.service for tenant in stats.tenants}
        self.shares.observe(services, {tenant_id: self._weight(tenant_id) for tenant_id in busy}, stats.time)

    def _weight(self, tenant_id: str) -> int:
        account = self.admission.accounts.get(tenant_id)
        if account is None or tenant_id == DEFAULT_TENANT_ID:
            return self.in_force.config.unknown_tenants.weight
        return account.config.weight

    def _snapshot(self) -> Snapshot:
        in_force = self.in_force
        return Snapshot(
            info=self.info,
            backend=self.backend_name,
            stats=self.backend.stats,
            tenants=list(self.tenants.values()),
            shares=self.shares.shares(),
            config_digest=in_force.digest,
            config_source=in_force.source,
            config_is_current=in_force.error is None,
            num_config_reloads=in_force.results,
            audited={tenant_id: account.audited for tenant_id, account in self.admission.accounts.items()},
        )


SERVICE = web.AppKey("service", Service)
