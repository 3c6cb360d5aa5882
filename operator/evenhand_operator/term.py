"""Term: what one replica does while it leads. Everything it knows beyond the cache ends with it.

Loops that do not wait for each other: `_build` makes documents and offers them to the pods, the Reporter writes
statuses, `_store` keeps the bootstrap Secrets, `_raise` starts a new epoch when a pod turns out to have a newer document.
"""

import asyncio
import logging
import time
from typing import NamedTuple

from evenhand_operator import metrics
from evenhand_operator.bootstrap_store import BootstrapStore
from evenhand_operator.cache import Cache
from evenhand_operator.debounce import Debounce
from evenhand_operator.documents import Documents
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.events import EventRecorder
from evenhand_operator.foreign import ForeignPools, look_whose
from evenhand_operator.issuer import IssuerWatch
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.lease import Lease
from evenhand_operator.lister import Lister
from evenhand_operator.objects import ObjectKey
from evenhand_operator.pod_link import PodReport, Version
from evenhand_operator.pusher import Pusher
from evenhand_operator.reconcile import World, ready_pods
from evenhand_operator.reporter import Reporter
from evenhand_operator.secret_references import referenced_secrets
from evenhand_operator.settings import Settings
from evenhand_operator.status_writer import StatusWriter

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_STORE_QUIET_SECONDS, _STORE_LONGEST_SECONDS = 1.0, 5.0
_HEARTBEAT_SECONDS = 5.0


class Surroundings(NamedTuple):
    """What a term works with and does not own.

    `cluster` is the uid of the namespace kube-system; `told` is set once pods were told what to enforce.
    """

    settings: Settings
    cluster: str
    cache: Cache
    kube: KubeClient
    engines: EngineClient
    lister: Lister
    lease: Lease
    issuer: IssuerWatch
    told: asyncio.Event


class Term:
    """One term as leader. Create it in the task group that it is to end with; `run` returns by an exception only.

    Attributes:
        heartbeat: monotonic time at which the building loop was last seen alive.
    """

    def __init__(self, surroundings: Surroundings, tasks: asyncio.TaskGroup) -> None:
        self._around = surroundings
        settings, cache, kube = surroundings.settings, surroundings.cache, surroundings.kube
        self.heartbeat = time.monotonic()
        self._bootstrap = BootstrapStore(kube)
        self._documents = Documents(self._bootstrap, lambda: surroundings.lease.epoch)
        self._pusher = Pusher(surroundings.engines, tasks, self._pod_answered)
        writer = StatusWriter(kube, cache, EventRecorder(kube, tasks))
        caught_up = surroundings.lister.caught_up
        self._reporter = Reporter(
            cache, self._documents, self._pusher, writer, settings, caught_up, surroundings.lease.installation
        )
        self._foreign = ForeignPools(kube, surroundings.lease.installation)
        self._changed = Debounce(settings.quiet_seconds, settings.longest_wait_seconds, settings.commit_patience)
        self._num_changes = 0
        self._is_stale = True
        self._to_store = Debounce(_STORE_QUIET_SECONDS, _STORE_LONGEST_SECONDS)
        self._overtaken: dict[ObjectKey, Version] = {}
        self._is_overtaken = asyncio.Event()
        for loop in (self._build, self._reporter.run, self._store, self._raise):
            tasks.create_task(loop(), name=f"term{loop.__name__}")
        self._changed.signal()

    def documents_changed(self) -> None:
        """What decides about documents is another."""
        self._is_stale = True
        self._num_changes += 1
        metrics.QUEUE_DEPTH.labels("changes").set(self._num_changes)
        self._changed.signal()

    def pods_changed(self) -> None:
        """Which pods are ready is another."""
        self._changed.signal()

    def statuses_changed(self) -> None:
        """A status is another."""
        self._reporter.signal()

    async def _build(self) -> None:
        while True:
            first_at = await self._changed.wait(timeout=_HEARTBEAT_SECONDS)
            self.heartbeat = time.monotonic()
            if first_at is None:
                continue
            try:
                if self._is_stale:
                    await self._rebuild()
            except ApiError as error:
                log.warning("cannot build the documents: %s", error)
                self._is_stale = True
                await asyncio.sleep(_RETRY_SECONDS)
                self._changed.signal()
                continue
            self._offer(first_at)
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - first_at)

    async def _rebuild(self) -> None:
        """What arrives while Secrets are read is for the next time: its own Secrets are not known yet."""
        cache = self._around.cache
        self._is_stale, self._num_changes = False, 0
        metrics.QUEUE_DEPTH.labels("changes").set(0)
        installation = self._around.lease.installation
        policies, pools, foreign = look_whose(cache.readable_policies(), cache.readable_pools(), installation)
        await self._foreign.tell(foreign)
        await self._around.lister.provide_secrets(referenced_secrets(policies, pools))
        metrics.BUILDS.inc()
        await self._documents.rebuild(
            World(
                cluster=self._around.cluster,
                issuer=self._around.issuer.issuer,
                policies=policies,
                pools=pools,
                secrets=cache.secrets.found,
                namespace_labels=cache.namespace_labels(),
            )
        )

    def _offer(self, first_at: float) -> None:
        """Tell every ready pod of every pool what to enforce."""
        plan = self._documents.plan
        for key, pool in plan.pools.items():
            pods = ready_pods(pool.pool, self._around.cache.pods)
            offer = self._documents.offer(key, max(1, len(pods)), first_at)
            self._pusher.sync(key, pods, offer, {row.name: row for row in pool.observed.status.pods})
        for key in self._pusher.pools() - plan.pools.keys():
            self._pusher.drop(key)
            self._bootstrap.forget(key)
        metrics.QUEUE_DEPTH.labels("pods").set(self._pusher.num_pending)
        self._look_whether_told()
        self._reporter.signal()
        self._to_store.signal()

    def _pod_answered(self, pool: ObjectKey, report: PodReport) -> None:
        metrics.QUEUE_DEPTH.labels("pods").set(self._pusher.num_pending)
        self._look_whether_told()
        self._reporter.pod_answered()
        if report.reason == "outdated" and report.enforced is not None:
            self._overtaken[pool] = max(report.enforced, self._overtaken.get(pool, report.enforced))
            self._is_overtaken.set()

    def _look_whether_told(self) -> None:
        if all(map(self._pusher.is_settled, self._documents.plan.pools)):
            self._around.told.set()

    async def _raise(self) -> None:
        """A pod has a document that is newer than ours, or another of the same version: start above it.

        That this replica still leads is shown by the compare-and-swap that raises the epoch; if it does not, the term
        ends here.
        """
        while True:
            await self._is_overtaken.wait()
            self._is_overtaken.clear()
            try:
                for pool, seen in list(self._overtaken.items()):
                    await self._raise_above(pool, seen)
                    del self._overtaken[pool]
            except ApiError as error:
                log.warning("cannot raise the epoch: %s", error)
                self._is_overtaken.set()
            await asyncio.sleep(_RETRY_SECONDS)  # a pod that lies cannot make this a busy loop

    async def _raise_above(self, pool: ObjectKey, seen: Version) -> None:
        if pool not in self._documents.plan.pools or seen < self._documents.rollout(pool).version:
            return
        epoch = await self._around.lease.raise_epoch(seen[0] + 1)
        log.warning("pool %s/%s: a pod enforces epoch %d revision %d; going on in epoch %d", *pool, *seen, epoch)
        self._documents.rollout(pool).raise_above(epoch, seen)
        self._changed.signal()

    async def store(self) -> bool:
        """Store the documents that are not stored yet; returns whether all of them are now."""
        is_complete = True
        for key, pool in self._documents.plan.pools.items():
            pods = ready_pods(pool.pool, self._around.cache.pods)
            try:
                await self._bootstrap.write(pool.observed, self._documents.offer(key, max(1, len(pods)), 0.0))
            except ApiError as error:
                log.warning("cannot store the document of pool %s/%s: %s", *key, error)
                is_complete = False
        return is_complete

    async def _store(self) -> None:
        while True:
            await self._to_store.wait()
            if not await self.store():
                await asyncio.sleep(_RETRY_SECONDS)
                self._to_store.signal()
