"""Pusher: the links to all pods of all pools."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Set

from evenhand_operator.canary import PATIENCE_SECONDS, Canary
from evenhand_operator.clock import SYSTEM_CLOCK, Clock
from evenhand_operator.engine_client import EngineClient
from evenhand_operator.objects import EnginePod, ObjectKey, read_time
from evenhand_operator.offer import Offer
from evenhand_operator.pod_link import Lanes, PodLink
from evenhand_operator.pod_report import PodReport
from evenhand_policy.status import PodState, PodStatus
from evenhand_policy.version import Version

MAX_PROVEN = 64
MAX_NEW = 32
MAX_LOST = 16


class Pusher:
    """Starts a link for each pod that is to be pushed to, and ends it when the pod is gone or restarted.

    Args:
        client: the way to the pods.
        tasks: in which the links run; one that fails by a fault of ours ends them all.
        notify: called with the pool's key and a pod's report after every change of the report.
        exists: whether there is a pod of that uid, whether it can be pushed to or not.
    """

    def __init__(
        self,
        client: EngineClient,
        tasks: asyncio.TaskGroup,
        notify: Callable[[ObjectKey, PodReport], None],
        exists: Callable[[str], bool],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._client = client
        self._tasks = tasks
        self._notify = notify
        self._exists = exists
        self._clock = clock
        self._lanes = Lanes(*(asyncio.Semaphore(most) for most in (MAX_PROVEN, MAX_NEW, MAX_LOST)))
        self._pools: dict[ObjectKey, _PoolLinks] = {}

    def sync(self, pool: ObjectKey, pods: Iterable[EnginePod], offer: Offer, known: Mapping[str, PodStatus]) -> None:
        """From now on exactly these pods of the pool are to enforce the offer.

        `known` are the rows, by pod, that an earlier leader wrote.
        """
        links = self._pools.setdefault(pool, _PoolLinks(self._clock, self._exists))
        links.offer = offer
        wanted = {pod.instance: pod for pod in pods}
        for instance in links.by_instance.keys() - wanted.keys():
            links.forget(instance)
        for instance, pod in wanted.items():
            if (link := links.by_instance.get(instance)) is not None:
                link.follow(pod)
                link.offer(offer)
            else:
                report = _first_report(pod, known.get(pod.name), self._clock.wall())
                links.by_instance[instance] = self._start(pool, links, report)
            links.count(links.by_instance[instance])
        links.look()

    def look(self) -> None:
        """To be called from time to time: a rollout that was stopped is tried again."""
        for links in self._pools.values():
            links.look()

    def drop(self, pool: ObjectKey) -> None:
        """End all links of a pool."""
        if links := self._pools.pop(pool, None):
            links.close()

    def pools(self) -> Set[ObjectKey]:
        """Pools that have links, or had some."""
        return self._pools.keys()

    def reports(self, pool: ObjectKey) -> list[PodReport]:
        """Where the pods of a pool stand, by name."""
        links = self._pools.get(pool)
        reports = [link.report for link in links.by_instance.values()] if links else []
        return sorted(reports, key=lambda report: report.pod.key)

    def is_settled(self, pool: ObjectKey) -> bool:
        """Whether every pod has answered, or failed to answer, the newest offer, or is not to be told of it."""
        links = self._pools.get(pool)
        return links is None or not links.unsettled or bool(links.canary.stopped)

    def is_proven(self, pool: ObjectKey, digest: str) -> bool:
        """Whether a pod of the pool is well with that document, or there is none to try it with."""
        links = self._pools.get(pool)
        return links is None or not links.by_instance or links.canary.is_proven(digest)

    def stopped(self, pool: ObjectKey) -> str:
        """Why the rollout of the newest document does not go on; empty while it does."""
        links = self._pools.get(pool)
        return links.canary.stopped if links else ""

    @property
    def num_pending(self) -> int:
        """Pods that do not enforce what they should."""
        return sum(len(links.unapplied) for links in self._pools.values())

    def _start(self, pool: ObjectKey, links: "_PoolLinks", report: PodReport) -> PodLink:
        assert links.offer

        def notify(link: PodLink) -> None:
            links.take_in(link)
            self._notify(pool, link.report)

        return PodLink(report, links.offer, self._client, links.canary, self._lanes, notify, self._tasks, self._clock)


class _PoolLinks:
    """Links to the pods of one pool, and which of them are not where they should be, kept as they change."""

    def __init__(self, clock: Clock, exists: Callable[[str], bool]) -> None:
        self.by_instance: dict[str, PodLink] = {}
        self.canary = Canary(clock.monotonic, exists)
        self.offer: Offer | None = None
        self.unsettled: set[str] = set()
        self.unapplied: set[str] = set()
        self._looking: asyncio.TimerHandle | None = None

    def count(self, link: PodLink) -> None:
        """Note where a link stands."""
        instance = link.report.pod.instance
        (self.unsettled.discard if link.is_settled else self.unsettled.add)(instance)
        (self.unapplied.discard if link.is_applied else self.unapplied.add)(instance)

    def take_in(self, link: PodLink) -> None:
        """A link's report is another."""
        if self.by_instance.get(link.report.pod.instance) is not link:
            return  # it was ended
        self.count(link)
        if self.canary.concerns(link.report):
            self.look()

    def look(self) -> None:
        """Let the canary decide who may be sent what, and wake those who now may."""
        if self.offer is None:
            return
        digest = self.offer.document.digest
        before = {each for each in self.unapplied if self.canary.admits(each, digest)}
        self.canary.look(digest, self.offer.version, [link.report for link in self.by_instance.values()])
        for instance in self.unapplied - before:
            if self.canary.admits(instance, digest):
                self.by_instance[instance].wake()
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        if self.canary.is_waiting:
            self._looking = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self.look)

    def close(self) -> None:
        """End all links."""
        for instance in list(self.by_instance):
            self.forget(instance)
        if self._looking is not None:
            self._looking.cancel()

    def forget(self, instance: str) -> None:
        """End a link."""
        self.by_instance.pop(instance).close()
        self.unsettled.discard(instance)
        self.unapplied.discard(instance)


def _first_report(pod: EnginePod, row: PodStatus | None, now: float) -> PodReport:
    """What is known before the first answer: what an earlier leader wrote counts if the container has not changed."""
    report = PodReport(pod=pod, state=PodState.PENDING, since=now)
    if row is None or row.epoch is None or row.revision is None or read_time(row.since) < pod.started_at:
        return report
    return PodReport(pod=pod, state=PodState.PENDING, since=report.since, enforced=Version(row.epoch, row.revision))
