"""Replica: one running operator. Every replica watches; the one that holds the Lease also acts."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from evenhand_operator import metrics
from evenhand_operator.cache import Cache
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.handlers import watch
from evenhand_operator.issuer import IssuerWatch
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.lease import Lease, LeaseLostError
from evenhand_operator.lister import Lister
from evenhand_operator.login import log_in, own_namespace
from evenhand_operator.pod_prover import PodProver
from evenhand_operator.resources import NAMESPACES
from evenhand_operator.settings import Settings
from evenhand_operator.signals import Signals
from evenhand_operator.signing_key import SigningKey
from evenhand_operator.term import Surroundings, Term
from evenhand_operator.web_server import Health, serving
from evenhand_policy.version import MAX_EPOCH, Version, may_be_overtaken

log = logging.getLogger(__name__)

_STUCK_SECONDS = 120.0
_RETRY_SECONDS = 2.0
_HEAD_START_SECONDS = 2.0
_LAST_WORDS_SECONDS = 2.0


class Replica:
    """Owns the cache and everything that lives as long as the process."""

    def __init__(self, settings: Settings, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings
        self._clock = clock
        self._info = log_in()
        self._kube = KubeClient(log_in, clock)
        self._signals = Signals(settings)
        self._cache = Cache(self._signals, clock)
        self._lister = Lister(self._kube, self._cache, settings, clock)
        self._signals.on_gap = self._lister.gap_seen
        self._issuer = IssuerWatch(self._kube, self._signals.documents_changed)
        namespace = settings.lease_namespace or own_namespace(self._info)
        self._key = SigningKey(self._kube, namespace, settings.key_rotation_seconds, clock)
        self._engines = EngineClient(lambda: self._key.current, PodProver(lambda: self._issuer.issuer), clock=clock)
        self._lease = Lease(self._kube, namespace, settings, self._least_epoch, clock)
        self._term: Term | None = None
        self._told = asyncio.Event()
        self._is_synced = False

    async def run(self, announce: Callable[[int], None]) -> None:
        """Runs until cancelled; then the Lease is released. `announce` is told the metrics port.

        Raises whatever the operator cannot cope with; then it is for the kubelet to start it again.
        """
        health = Health(self._is_alive, lambda: None if self._is_synced else "not everything is listed yet")
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._kube.close)
            stack.push_async_callback(self._engines.close)
            server = serving(self._settings.host, self._settings.metrics_port, self._cache, health)
            announce(await stack.enter_async_context(server))
            async with asyncio.TaskGroup() as tasks:
                reading = self._read_cluster(), self._issuer.read(), self._lister.start(tasks)
                cluster, _, _ = await asyncio.gather(*reading)
                self._is_synced = True
                for each in (
                    self._lead(cluster),
                    self._watch(),
                    self._lister.run(),
                    self._issuer.run(self._settings.relist_seconds),
                ):
                    tasks.create_task(each)

    async def _watch(self) -> None:
        """Let a leader tell the pods first: with thousands of objects Kopf's own list takes seconds of computing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEAD_START_SECONDS):
                await self._told.wait()
        await watch(
            self._cache,
            self._settings,
            lambda: self._lister.readable_namespaces,
            lambda: self._kube.credentials,
            self._clock,
        )

    async def _lead(self, cluster: str) -> None:
        """One term after another, for ever."""
        around = Surroundings(
            self._settings,
            cluster,
            self._cache,
            self._signals,
            self._kube,
            self._engines,
            self._key,
            self._lister,
            self._lease,
            self._issuer,
            self._told,
            self._clock,
        )
        while True:
            await self._lease.acquire()
            metrics.IS_LEADER.set(1)
            try:
                await self._serve_term(around)
            finally:
                self._term = None
                metrics.IS_LEADER.set(0)
                metrics.show_queues(*[lambda: 0.0] * 3)
                await _briefly(self._lease.release())

    async def _serve_term(self, around: Surroundings) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                self._term = Term(around, tasks)
                await self._lease.hold()
        except asyncio.CancelledError:  # told to stop, and still the leader
            if self._term is not None:
                await _briefly(self._term.end())
            raise
        except ExceptionGroup as group:
            lost, others = group.split(LeaseLostError)
            if others is not None:
                raise others from None
            log.warning("no longer leader: %s", lost.exceptions[0] if lost else "")

    def _is_alive(self) -> str | None:
        if self._term is not None and self._clock.monotonic() - self._term.heartbeat > _STUCK_SECONDS:
            return "nothing was built for too long"
        return None

    def _least_epoch(self) -> int:
        """The highest epoch that any status tells of, should the Lease have been deleted.

        What a pod claims beyond what may be overtaken does not count: no leader made it.
        """
        epochs = [0]
        for pool in self._cache.pools:
            own = Version(pool.status.epoch or 0, 0)
            seen = (Version(row.epoch or 0, 0) for row in pool.status.pods)
            epochs += [own.epoch, *(each.epoch for each in seen if may_be_overtaken(each, own))]
        return max(epoch for epoch in epochs if epoch < MAX_EPOCH)

    async def _read_cluster(self) -> str:
        """By the uid of kube-system clusters are told apart: a document of another one is refused by engines."""
        while True:
            try:
                return str((await self._kube.get(NAMESPACES, None, "kube-system"))["metadata"]["uid"])
            except ApiError as error:
                log.warning("cannot read the namespace kube-system: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)


async def _briefly(last_words: Awaitable[object]) -> None:
    """Await what is to be done before the end, if it does not take long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_SECONDS):
            await last_words
