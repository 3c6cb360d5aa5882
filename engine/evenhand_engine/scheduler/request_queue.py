"""RequestQueue: the requests of one tenant that wait to run, in order of arrival, or by user with equal shares."""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import attrgetter

from evenhand_engine.scheduler.fair_share import FairShare
from evenhand_engine.scheduler.request import Request

_position = attrgetter("position")


class RequestQueue:
    """FIFO by position, so that a preempted request finds its place again.

    With `per_user` each user has a FIFO of its own and the user who was served least goes first, by the same rule that
    shares the engine between tenants.
    """

    def __init__(self, *, per_user: bool) -> None:
        self.per_user = per_user
        self.users = FairShare()
        self._lines: dict[str, deque[Request]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        for line in self._lines.values():
            yield from line

    def push(self, request: Request) -> None:
        """Add by position: at the end for a new request, further ahead for one that was preempted."""
        key = self._line_of(request)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = deque()
            self.users.enter(key)
        if not line or line[-1].position < request.position:
            line.append(request)
        elif request.position < line[0].position:
            line.appendleft(request)
        else:
            insort(line, request, key=_position)
        self._size += 1

    def remove(self, request: Request) -> None:
        """Take out a request, which must be in the queue; O(1) for a head."""
        key = self._line_of(request)
        line = self._lines[key]
        if line[0] is request:
            line.popleft()
        else:
            line.remove(request)
        if not line:
            del self._lines[key]
            self.users.leave(key)
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
        return self._lines[""][0] if may_start and self._size else None

    def close_step(self, started: Iterable[Request]) -> None:
        """Advance the users' virtual time; `started`: prompts in progress that the step left unfinished."""
        least_waiting = (user for _, _, user in islice(self.users.in_order(), 1))
        self.users.close_step((*least_waiting, *(request.user for request in started)))

    def _first_of_users(self, started: Iterable[Request], *, may_start: bool) -> Request | None:
        prompts = list(started)
        if may_start:
            prompts += [self._lines[user][0] for _, _, user in islice(self.users.in_order(), 1)]
        return min(prompts, key=lambda r: (self.users.virtual_service(r.user), r.position), default=None)

    def _line_of(self, request: Request) -> str:
        return request.user if self.per_user else ""
