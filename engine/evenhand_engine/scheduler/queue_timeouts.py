"""QueueTimeouts: which queued requests have waited longer than their tenant's queueTimeout."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from evenhand_engine.scheduler.request import Request
from evenhand_engine.scheduler.request_table import RequestTable

_NEVER = float("inf")


class QueueTimeouts:
    """Requests by the time at which they leave if they never ran; a step in which none is due costs nothing."""

    def __init__(self, request_table: RequestTable) -> None:
        self._request_table = request_table
        self._due: list[tuple[float, str]] = []  # a heap of (time, request id)

    def watch(self, request: Request) -> None:
        """Note a request that begins to wait."""
        seconds = self._request_table.tenants[request.tenant_id].queue_timeout
        if seconds != _NEVER:
            heappush(self._due, (request.arrival_time + seconds, request.request_id))

    def reset(self) -> None:
        """Look at all live requests again: the tenants' timeouts may have changed."""
        tenants = self._request_table.tenants
        due = (
            (r.arrival_time + tenants[r.tenant_id].queue_timeout, i) for i, r in self._request_table.requests.items()
        )
        self._due = [entry for entry in due if entry[0] != _NEVER]
        heapify(self._due)

    @property
    def next_due(self) -> float:
        """When the next one may be due; infinite: none."""
        return self._due[0][0] if self._due else _NEVER

    def take_overdue(self, now: float) -> Iterator[Request]:
        """Take out those that are due; one that ran, even if it was preempted since, had its turn."""
        while self._due and self._due[0][0] < now:
            request = self._request_table.requests.get(heappop(self._due)[1])
            if request is not None and request.started_at is None and request.num_preemptions == 0:
                yield request
