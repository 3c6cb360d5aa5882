"""Service: the owner of what tenants share, and the one place where a new config takes effect.

And EngineService: what each process that serves our own engine's public port needs beside its door to the owner.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from aiohttp import web

from evenhand_engine.backends.backend import Backend, Enforcer, ModelInfo
from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.admission import Admission
from evenhand_engine.frontend.auth import Authenticator
from evenhand_engine.frontend.body_memory import BodyMemory, Held
from evenhand_engine.frontend.config_in_force import ConfigInForce
from evenhand_engine.frontend.config_store import ConfigDocument
from evenhand_engine.frontend.fair_executor import FairExecutor
from evenhand_engine.frontend.metrics import Metrics
from evenhand_engine.frontend.metrics_collector import Snapshot
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.frontend.share_tracker import ShareTracker
from evenhand_engine.frontend.write_timeout import WriteTimeout
from evenhand_engine.messages import EngineStats, TenantStats
from evenhand_engine.structured.compiler import Compiler
from evenhand_engine.text.tokenizer import Tokenizer
from evenhand_policy.config import DEFAULT_TENANT_ID, SchedulerConfig
from evenhand_policy.push_protocol import ConfigSource

if TYPE_CHECKING:
    from evenhand_engine.frontend.door import Door

_TOKENIZER_THREADS = 2
_INLINE_BYTES = 4096  # so little is tokenized in about the time that a thread needs to wake

T = TypeVar("T")


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
        self.authenticator = make_authenticator(settings, in_force.config)
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
        return served_names(self.settings, self.info)

    @property
    def is_configured(self) -> bool:
        """False while an operator's config was neither loaded nor pushed; requests are refused."""
        waits = self.settings.push is not None and not self.settings.allow_unconfigured
        return not waits or self.in_force.source is not ConfigSource.BUILT_IN

    def _enforce(self, document: ConfigDocument) -> None:
        """Enforce a config from now on, here and in the engine; requests in flight go on."""
        config, num_replicas = document.config, document.assignment.num_replicas
        self.authenticator = make_authenticator(self.settings, config)
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


class EngineService:
    """What a process at the public port of our own engine needs: it tokenizes here, and asks its door for the rest."""

    def __init__(
        self, settings: ServerSettings, backend: Backend, tokenizer: Tokenizer, compiler: Compiler, door: "Door"
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.tokenizer = tokenizer
        self.door = door
        self.created = int(time.time())
        self.compiler = compiler
        self._executor = FairExecutor(_TOKENIZER_THREADS)

    @property
    def backend_name(self) -> str:
        """What generates, in a word."""
        return "evenhand"

    @property
    def info(self) -> ModelInfo:
        return self.backend.info

    @property
    def model_names(self) -> tuple[str, ...]:
        return served_names(self.settings, self.info)

    def check_model(self, model: str | None) -> None:
        """Raises Refusal 404 unless `model` is one of ours; None is."""
        if model is not None and model not in self.model_names:
            names = ", ".join(self.model_names)
            raise Refusal(
                404, "model_not_found", f"Model {model[:200]!r} is not served here, but {names}.", param="model"
            )

    async def compute(self, tenant_id: str, num_bytes: int, function: Callable[[], T]) -> T:
        """The result of `function`, which turns a body of `num_bytes` into tokens or back.

        A large one is worked on off the event loop and in the tenant's turn.
        """
        if num_bytes <= _INLINE_BYTES:
            return function()
        return await self.compute_aside(tenant_id, function)

    async def compute_aside(self, tenant_id: str, function: Callable[[], T]) -> T:
        """The result of `function`, which may take long: off the event loop and in the tenant's turn."""
        return await self._executor.run(tenant_id, function)

    def close(self) -> None:
        self._executor.close()


def served_names(settings: ServerSettings, info: ModelInfo) -> tuple[str, ...]:
    """Under which clients may ask for the model; the first is the one that answers carry."""
    return settings.served_model_names or (info.model_name,)


def make_authenticator(settings: ServerSettings, config: SchedulerConfig) -> Authenticator:
    """Who may use the engine, by the config and by the command line."""
    key = settings.api_key
    return Authenticator(config, anonymous=settings.anonymous and key is None, shared_keys=[] if key is None else [key])


SETTINGS = web.AppKey("settings", ServerSettings)
SERVICE = web.AppKey("service", Service)
ENGINE = web.AppKey("engine", EngineService)
TENANT_ID = web.RequestKey("tenant_id", str)
REQUEST_ID = web.RequestKey("request_id", str)
BODY = web.RequestKey("body", Held)
WRITES = web.RequestKey("writes", WriteTimeout)
LOG_FIELDS = web.RequestKey("log_fields", dict[str, Any])
"""What a handler adds to its line in the access log."""
