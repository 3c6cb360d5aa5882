"""Term: what one replica does while it leads. Everything it knows beyond the cache ends with it.

Loops that do not wait for each other: `_build` makes documents and offers them to the pods, the Reporter writes
statuses, `_store` keeps the bootstrap Secrets, `_raise` starts a new epoch when a pod turns out to have a newer document.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import NamedTuple

from evenhand_operator import metrics
from evenhand_operator.bootstrap_store import BootstrapStore, SupersededError
from evenhand_operator.cache import Cache
from evenhand_operator.clock import Clock
from evenhand_operator.documents import Documents, all_understand
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.events import EventRecorder
from evenhand_operator.foreign import ForeignPools, look_whose
from evenhand_operator.issuer import IssuerWatch
from evenhand_operator.kube import ApiError, KubeClient
from evenhand_operator.lease import Lease
from evenhand_operator.lister import Lister
from evenhand_operator.objects import EnginePod, ObjectKey
from evenhand_operator.overtaken import Overtaken
from evenhand_operator.pod_report import PodReport
from evenhand_operator.pusher import Pusher
from evenhand_operator.reconcile import PoolPlan, World
from evenhand_operator.reporter import Reporter
from evenhand_operator.secret_references import referenced_secrets
from evenhand_operator.settings import Settings
from evenhand_operator.signals import Signals
from evenhand_operator.signing_key import SigningKey
from evenhand_operator.status_writer import StatusWriter
from evenhand_policy.compact import Members
from evenhand_policy.version import Version, may_be_overtaken

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_HEARTBEAT_SECONDS = 5.0
_RAISE_SECONDS = 0.2


class Surroundings(NamedTuple):
    """What a term works with and does not own.

    `cluster` is the uid of the namespace kube-system; `told` is set once pods were told what to enforce.
    """

    settings: Settings
    cluster: str
    cache: Cache
    signals: Signals
    kube: KubeClient
    engines: EngineClient
    key: SigningKey
    lister: Lister
    lease: Lease
    issuer: IssuerWatch
    told: asyncio.Event
    clock: Clock


class Term:
    """One term as leader. Create it in the task group that it is to end with; `run` returns by an exception only.

    Attributes:
        heartbeat: monotonic time at which the building loop was last seen alive.
    """

    def __init__(self, surroundings: Surroundings, tasks: asyncio.TaskGroup) -> None:
        self._around = surroundings
        self._signals = surroundings.signals
        self._clock = surroundings.clock
        cache, kube = surroundings.cache, surroundings.kube
        self.heartbeat = self._clock.monotonic()
        self._bootstrap = BootstrapStore(kube, surroundings.key)
        self._documents = Documents(self._bootstrap, lambda: surroundings.lease.epoch)
        self._pusher = Pusher(
            surroundings.engines, tasks, self._pod_answered, lambda uid: cache.pods.get(uid) is not None, self._clock
        )
        writer = StatusWriter(kube, cache, EventRecorder(kube, tasks, self._clock), self._clock)
        self._reporter = Reporter(
            cache,
            self._signals,
            self._documents,
            self._pusher,
            writer,
            surroundings.settings,
            surroundings.lister.caught_up,
            surroundings.lease.installation,
            self._clock,
        )
        self._foreign = ForeignPools(kube, surroundings.lease.installation, self._clock)
        self._trusting: dict[ObjectKey, str] = {}  # uid of each pool whose pods can know whom to believe
        self._understood: dict[ObjectKey, Members] = {}
        self._unproven: dict[ObjectKey, str] = {}  # digest of each document that was to be stored, and is not yet
        self._overtaken = Overtaken(self._clock.monotonic)
        metrics.show_queues(
            lambda: self._signals.num_changes, lambda: self._reporter.num_due, lambda: self._pusher.num_pending
        )
        self._signals.is_stale = True
        self._signals.changed.signal()
        for loop in (self._build, self._reporter.run, self._store, self._raise):
            tasks.create_task(loop(), name=f"term{loop.__name__}")

    async def _build(self) -> None:
        while True:
            first_at = await self._signals.changed.wait(timeout=_HEARTBEAT_SECONDS)
            self.heartbeat = self._clock.monotonic()
            if first_at is None:
                self._pusher.look()
                await self._foreign.look(self._around.cache.readable_pools())
                continue
            try:
                if not self._around.key.trusted:
                    await self._around.key.refresh()
                if self._signals.is_stale:
                    await self._rebuild()
                await self._documents.offer(self._around.cache.pods, self._understood_by, first_at)
                await self._trust()
            except ApiError as error:
                log.warning("cannot build the documents: %s", error)
                self._signals.is_stale = True
                await asyncio.sleep(_RETRY_SECONDS)
                self._signals.changed.signal()
                continue
            self._push()
            metrics.RECONCILE_SECONDS.observe(self._clock.monotonic() - first_at)

    async def _rebuild(self) -> None:
        """What arrives while Secrets are read is for the next time: its own Secrets are not known yet."""
        cache, signals = self._around.cache, self._signals
        signals.is_stale, signals.num_changes = False, 0
        installation = self._around.lease.installation
        policies, pools = look_whose(cache.readable_policies(), cache.readable_pools(), installation)
        await self._foreign.look(cache.readable_pools())
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
            ),
            {pool.key for pool in cache.pools},
        )

    async def _trust(self) -> None:
        """Pods of a new pool wait to be started until they are told whom to believe. Raises ApiError."""
        for key, plan in self._open_pools():
            if self._trusting.get(key) != plan.observed.uid:
                await self._bootstrap.trust(plan.observed, self._documents.offers[key].offer)
                self._trusting[key] = plan.observed.uid

    def _push(self) -> None:
        """Tell every pod of every pool what to enforce."""
        for key, made in self._documents.offers.items():
            if made.offer is not None:
                rows = {row.name: row for row in self._documents.plan.pools[key].observed.status.pods}
                self._pusher.sync(key, made.pods, made.offer, rows)
        for key in self._pusher.pools() - self._documents.offers.keys():
            self._pusher.drop(key)
            self._bootstrap.forget(key)
            self._trusting.pop(key, None)
        self._look_whether_told()
        self._signals.statuses.signal()
        self._signals.stored.signal()

    def _understood_by(self, pool: ObjectKey, pods: Iterable[EnginePod]) -> Members:
        instances = {pod.instance for pod in pods}
        reports = (report for report in self._pusher.reports(pool) if report.pod.instance in instances)
        self._understood[pool] = all_understand(report.understands for report in reports)
        return self._understood[pool]

    def _pod_answered(self, pool: ObjectKey, report: PodReport) -> None:
        self._look_whether_told()
        self._reporter.pod_answered()
        if pool in self._unproven and self._pusher.is_proven(pool, self._unproven[pool]):
            self._signals.stored.signal()
        if report.understands is not None and not self._understood.get(pool, report.understands) <= report.understands:
            self._signals.changed.signal()
        if report.reason == "outdated" and report.enforced is not None:
            self._overtaken.see(pool, report.enforced)

    def _look_whether_told(self) -> None:
        if not self._around.told.is_set() and all(map(self._pusher.is_settled, self._documents.plan.pools)):
            self._around.told.set()

    async def _raise(self) -> None:
        """A pod has a document that is newer than ours, or another of the same version: start above it.

        That this replica still leads is shown by the compare-and-swap that raises the epoch; if it does not, the term
        ends here.
        """
        while True:
            await asyncio.sleep(_RAISE_SECONDS)
            for pool, seen in self._overtaken.due().items():
                try:
                    await self._raise_above(pool, seen)
                except ApiError as error:
                    log.warning("cannot raise the epoch: %s", error)

    async def _raise_above(self, pool: ObjectKey, seen: Version) -> None:
        if pool not in self._documents.plan.pools or seen < (own := self._documents.rollout(pool).version):
            self._overtaken.dismiss(pool)
            return
        if not may_be_overtaken(seen, own):
            log.error("pool %s/%s: a pod says that it enforces epoch %d, which is not believed", *pool, seen.epoch)
            self._overtaken.dismiss(pool)
            return
        epoch = await self._around.lease.raise_epoch(seen.epoch + 1)
        log.warning("pool %s/%s: a pod enforces epoch %d revision %d; going on in epoch %d", *pool, *seen, epoch)
        self._documents.rollout(pool).raise_above(epoch, seen)
        self._overtaken.raised(pool)
        self._signals.changed.signal()

    async def end(self) -> None:
        """What is left to do for a leader that is told to stop."""
        await asyncio.gather(self.store(), self._foreign.take_back())

    async def store(self) -> bool:
        """Store what is in force and not stored yet; returns whether all of it is now."""
        is_complete = True
        self._unproven.clear()
        for key, plan in self._open_pools():
            made = self._documents.offers.get(key)
            if made is None or made.offer is None:
                continue
            if not self._pusher.is_proven(key, made.offer.document.digest):
                self._unproven[key] = made.offer.document.digest
                continue
            try:
                await self._bootstrap.write(plan.observed, made.offer)
            except SupersededError as error:
                log.warning("the document of pool %s/%s is not stored: %s", *key, error)
            except ApiError as error:
                log.warning("cannot store the document of pool %s/%s: %s", *key, error)
                is_complete = False
        return is_complete

    def _open_pools(self) -> Iterable[tuple[ObjectKey, PoolPlan]]:
        """Those that exist: the Secrets of others go with them."""
        return [(key, plan) for key, plan in self._documents.plan.pools.items() if not plan.is_closed]

    async def _store(self) -> None:
        """After changes, and from time to time, however many those are: somebody may have deleted what was stored, and a
        key grows old."""
        relist_seconds = self._around.settings.relist_seconds
        due = self._clock.monotonic() + relist_seconds
        while True:
            await self._signals.stored.wait(timeout=due - self._clock.monotonic())
            is_complete = False
            while not is_complete:
                try:
                    if self._clock.monotonic() >= due:
                        await self._look_anew()
                        due = self._clock.monotonic() + relist_seconds
                    is_complete = await self.store()
                except ApiError as error:
                    log.warning("cannot read the key to sign with: %s", error)
                if not is_complete:
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _look_anew(self) -> None:
        """What is stored may be another by now, and so may the key. Raises ApiError."""
        for key in self._documents.plan.pools:
            self._bootstrap.forget(key)
        if await self._around.key.refresh():
            self._trusting.clear()
            self._signals.changed.signal()
