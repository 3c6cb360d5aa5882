"""TenantQueue: the requests of one tenant that wait to run: in order of arrival, by user with equal shares, or by priority."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from operator import attrgetter

from evenhand_engine.scheduler.fair_share import FairShare
from evenhand_engine.scheduler.request import Request
from evenhand_policy.config import Fairness

_position = attrgetter("position")


class TenantQueue:
    """FIFO by position, so that a preempted request finds its place again.

    Under PerUser each user has a FIFO of its own and the user who was served least goes first, by the same rule that
    shares the engine between tenants. Under Priority each priority has one, and the lowest goes first.
    """

    def __init__(self, fairness: Fairness) -> None:
        self.fairness = fairness
        self.per_user = fairness is Fairness.PER_USER
        self.users = FairShare()
        self._lines: dict[tuple[int, str], OrderedDict[str, Request]] = {}  # of each priority or user, by request id
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        for line in self._lines.values():
            yield from line.values()

    def push(self, request: Request) -> None:
        """Add by position: at the end for a new request; O(1). One that was preempted goes before those that never
        ran, in O(number of those that were preempted too)."""
        key = self._line_of(request)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = OrderedDict()
            if self.per_user:
                self.users.enter(request.user)
        is_last = not line or line[next(reversed(line))].position < request.position
        ahead = [] if is_last else list(takewhile(lambda r: r.position < request.position, line.values()))
        line[request.request_id] = request
        if not is_last:
            for other in (request, *reversed(ahead)):
                line.move_to_end(other.request_id, last=False)
        self._size += 1

    def extend(self, requests: Iterable[Request]) -> None:
        """Add many at once, whatever their positions; O(n log n) with those that wait."""
        merged = sorted((*self, *requests), key=_position)
        for request in list(self):
            self.remove(request)
        for request in merged:
            self.push(request)

    def remove(self, request: Request) -> None:
        """Take out a request, which must be in the queue; O(1) wherever it stands."""
        key = self._line_of(request)
        line = self._lines[key]
        del line[request.request_id]
        if not line:
            del self._lines[key]
            if self.per_user:
                self.users.leave(request.user)
        self._size -= 1

    def charge(self, request: Request, cost: int) -> None:
        """Charge the request's user."""
        self.users.charge(request.user, cost, 1)

    def first(self, started: Iterable[Request], *, may_start: bool) -> Request | None:
        """Who computes next: of the tenant's `started` prompts (oldest first) and, if one more may start, the heads."""
        if self.per_user:
            return self._first_of_users(started, may_start=may_start)
        for request in started:
            return request
        return self._head(min(self._lines)) if may_start and self._size else None

    def close_step(self, started: Iterable[Request]) -> None:
        """Advance the users' virtual time; `started`: prompts in progress that the step left unfinished."""
        least_waiting = (user for _, _, user in islice(self.users.in_order(), 1))
        self.users.close_step((*least_waiting, *(request.user for request in started)))

    def _first_of_users(self, started: Iterable[Request], *, may_start: bool) -> Request | None:
        prompts = list(started)
        if may_start:
            prompts += [self._head((0, user)) for _, _, user in islice(self.users.in_order(), 1)]
        return min(prompts, key=lambda r: (self.users.virtual_service(r.user), r.position), default=None)

    def _head(self, key: tuple[int, str]) -> Request:
        return next(iter(self._lines[key].values()))

    def _line_of(self, request: Request) -> tuple[int, str]:
        priority = request.priority if self.fairness is Fairness.PRIORITY else 0
        return priority, request.user if self.per_user else ""
