"""Pusher: the links to all pods of all pools."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Set

from evenhand_operator.engine_client import EngineClient, Offer
from evenhand_operator.objects import EnginePod, ObjectKey, read_time
from evenhand_operator.pod_link import Lanes, PodLink, PodReport
from evenhand_policy.status import PodState, PodStatus

MAX_PROVEN = 64
MAX_UNPROVEN = 32


class Pusher:
    """Starts a link for each pod that is to be pushed to, and ends it when the pod is gone or restarted.

    Args:
        client: the way to the pods.
        tasks: in which the links run; one that fails by a fault of ours ends them all.
        notify: called with the pool's key and a pod's report after every change of the report.
    """

    def __init__(
        self, client: EngineClient, tasks: asyncio.TaskGroup, notify: Callable[[ObjectKey, PodReport], None]
    ) -> None:
        self._client = client
        self._tasks = tasks
        self._notify = notify
        self._lanes = Lanes(proven=asyncio.Semaphore(MAX_PROVEN), unproven=asyncio.Semaphore(MAX_UNPROVEN))
        self._links: dict[ObjectKey, dict[str, PodLink]] = {}

    def sync(self, pool: ObjectKey, pods: Iterable[EnginePod], offer: Offer, known: Mapping[str, PodStatus]) -> None:
        """From now on exactly these pods of the pool are to enforce the offer.

        `known` are the rows, by pod, that an earlier leader wrote.
        """
        links = self._links.setdefault(pool, {})
        wanted = {pod.instance: pod for pod in pods}
        for instance in links.keys() - wanted.keys():
            links.pop(instance).close()
        for instance, pod in wanted.items():
            if instance in links:
                links[instance].offer(offer)
            else:
                report = _first_report(pod, known.get(pod.name))
                links[instance] = PodLink(
                    report, offer, self._client, self._lanes, lambda report: self._notify(pool, report), self._tasks
                )

    def drop(self, pool: ObjectKey) -> None:
        """End all links of a pool."""
        for link in self._links.pop(pool, {}).values():
            link.close()

    def pools(self) -> Set[ObjectKey]:
        """Pools that have links, or had some."""
        return self._links.keys()

    def reports(self, pool: ObjectKey) -> list[PodReport]:
        """Where the pods of a pool stand, by name."""
        return sorted((link.report for link in self._links.get(pool, {}).values()), key=lambda report: report.pod.key)

    def is_settled(self, pool: ObjectKey) -> bool:
        """Whether every pod has answered, or failed to answer, the newest offer."""
        return all(link.is_settled for link in self._links.get(pool, {}).values())

    @property
    def num_pending(self) -> int:
        """Pods that do not enforce what they should."""
        return sum(not link.is_applied for links in self._links.values() for link in links.values())


def _first_report(pod: EnginePod, row: PodStatus | None) -> PodReport:
    """What is known before the first answer: what an earlier leader wrote counts if the container has not changed."""
    report = PodReport(pod=pod, state=PodState.PENDING, since=time.time())
    if row is None or row.epoch is None or row.revision is None or read_time(row.since) < pod.started_at:
        return report
    return PodReport(
        pod=pod,
        state=PodState.PENDING,
        since=report.since,
        boot_id=row.boot_id or "",
        enforced=(row.epoch, row.revision),
    )
