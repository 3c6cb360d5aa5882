"""RequestQueue: the requests of one tenant that wait to run, in order of arrival, or by user with equal shares."""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from operator import attrgetter

from evenhand_engine.fair_share import FairShare
from evenhand_engine.request import Request

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
        line = self._lines.setdefault(self._line_of(request), deque())
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
        self._size -= 1

    def heads(self) -> list[Request]:
        """The oldest request of each line."""
        return [line[0] for line in self._lines.values()]

    def overdue(self, latest_arrival: float) -> Iterator[Request]:
        """Requests that arrived before and never ran; one that was preempted had its turn and is not overdue."""
        for line in self._lines.values():
            for request in line:
                if request.num_preemptions:
                    continue
                if request.arrival_time >= latest_arrival:
                    break
                yield request

    def charge(self, request: Request, cost: int) -> None:
        """Charge the request's user."""
        self.users.charge(request.user, cost, 1)

    def first(self, started: Iterable[Request], *, may_start: bool) -> Request | None:
        """Who computes next: of the tenant's `started` prompts (oldest first) and, if one more may start, the heads."""
        if self.per_user:
            return min(
                (*started, *(self.heads() if may_start else ())),
                key=lambda request: (self.users.virtual_service(request.user), request.position),
                default=None,
            )
        for request in started:
            return request
        return self._lines[""][0] if may_start and self._size else None

    def close_step(self, started: Iterable[Request]) -> None:
        """Advance the users' virtual time; `started`: prompts in progress that the step left unfinished."""
        self.users.close_step({request.user for request in (*started, *self.heads())})

    def _line_of(self, request: Request) -> str:
        return request.user if self.per_user else ""
